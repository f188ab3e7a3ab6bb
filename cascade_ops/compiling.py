"""`torch.compile` for the blocks of a model.

The blocks are compiled and not the whole network: a network has a hundred blocks of a few kinds, and one compilation
serves all blocks of a kind and shape, so that the start-up is seconds and not minutes. What a compiler can fuse (norms,
activations, modulation and residual with the work around them) lies inside the blocks.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .models.in_place import Workspace
from .models.layers import AttnBlock, FeedForwardBlock, ResBlock
from .models.stage_a import MixingBlock

_BLOCKS = (ResBlock, AttnBlock, FeedForwardBlock, MixingBlock)

# PyTorch gives up on code that it had to compile for more shapes than this, 8 by default; Stage B has that many in one
# picture, with its four levels, their skips and the unguided half.
_SHAPES = 64

# The tests have one that compiles nothing.
BACKEND: str | Callable[..., Any] = "inductor"


def compiler_missing(device: torch.device) -> str:
    """What `torch.compile` lacks to compile for a device, in a few words; empty where it lacks nothing."""
    # Before 2.5, blocks of one kind did not share a compilation.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5):
        return f"PyTorch 2.5 or newer (this is {torch.__version__})"
    try:
        torch._dynamo.eval_frame.check_if_dynamo_supported()
    except RuntimeError as error:
        return f"a Python that it knows ({str(error).splitlines()[0]})"
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "the package triton"
    named = os.environ.get("CXX")
    compilers = [named] if named else ["g++", "clang++", "cl", "icpx"]
    return "" if any(map(shutil.which, compilers)) else f"a C++ compiler ({' or '.join(compilers)})"


# By model. No value may refer to its key, or neither would ever be freed.
_compiled: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def compiled(model: nn.Module) -> Any:
    """The same model over the same weights with its blocks compiled at their first call; `model` stays as it is."""
    if model not in _compiled:
        _compiled[model] = _twin(model)
    return _compiled[model]


def _twin(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = {name: None if inner is None else _twin(inner) for name, inner in module._modules.items()}
    if isinstance(twin, _BLOCKS):
        # Writing over its input, for which a block is given a workspace, would keep the compiler from arranging that.
        block = torch.compile(twin._call_impl, backend=BACKEND, dynamic=False)

        def whole(*given: Any) -> Any:
            return block(*(None if isinstance(each, Workspace) else each for each in given))

        # `over` is what Stage A calls for it.
        twin.__dict__.update(_compiled_call_impl=whole, over=whole)
    return twin


@contextmanager
def compiling(title: str) -> Iterator[None]:
    """Run compiled code; a failure of the compiler becomes one sentence about the stage of that title."""
    from torch._dynamo import config, exc

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    try:
        with config.patch({limit: _SHAPES}):
            yield
    except exc.TorchDynamoException as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"torch.compile could not compile {title} ({first}), expected a working compiler for this device: choose "
            "another method, or install what it asks for."
        ) from error
