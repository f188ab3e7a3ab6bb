"""A recorder that needs no GPU and still forgets what a CUDA graph forgets.

It records operators with the very tensors that they read and wrote, as a CUDA graph records launches with addresses.
A replay calls no Python of the model: what was decided there stays decided, and what was not copied into a buffer that
was read stays as it was.
"""

from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stable_cascade_nodes.cascade_ops import graphs


def _memory(value):
    return {each.untyped_storage().data_ptr() for each in tree_leaves(value) if isinstance(each, torch.Tensor)}


class Recording(TorchDispatchMode):
    """The operators that ran inside of it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, result))
        return result

    def replay(self):
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            # A view, and what was written in place, lie where they lay.
            if _memory(result) & _memory((args, kwargs)):
                continue
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class OperatorRecorder:
    """Counts what it did; `broken` fails each capture."""

    def __init__(self, broken=False):
        self.broken = broken
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, run):
        self.warm_ups += 1
        return run()

    def capture(self, run):
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.captures += 1
        with Recording() as recording:
            result = run()
        # A capture computes nothing.
        result.fill_(float("nan"))

        def replay():
            self.replays += 1
            recording.replay()

        return replay, result

    @property
    def counts(self):
        return self.warm_ups, self.captures, self.replays


@pytest.fixture
def recorder(monkeypatch):
    """What records on every device in this test; nothing is recorded when it begins."""
    made = OperatorRecorder()
    monkeypatch.setattr(graphs, "_graphs", WeakKeyDictionary())
    monkeypatch.setattr(graphs, "recorder_for", lambda device: made)
    return made
