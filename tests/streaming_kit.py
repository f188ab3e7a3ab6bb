"""A device for streaming that needs none: its copies come late, and it counts what is on it."""

import weakref
from types import SimpleNamespace

import torch

from stable_cascade_nodes.cascade_ops.models import StageB, StageC

POISON = float("nan")


class LateLane:
    """Stands in for a GPU on the CPU. A copy happens only when its arrival is waited for, and until then its target
    holds no numbers: who does not wait computes nonsense. A buffer may be copied to only after the mark that was set
    when it was left. `main_memory` is what was pinned, `on_device` the bytes of the buffers alive."""

    def __init__(self, pinned_limit=None):
        self.device = torch.device("cpu")
        self.on_device, self.pieces, self.limit = 0, [], pinned_limit
        self.moment, self.log, self.readable = 0, [], {}

    def buffer(self, size):
        made = torch.empty(size, dtype=torch.uint8)
        self.on_device += size
        weakref.finalize(made, self._gone, size)
        self.readable[made.data_ptr()] = -1
        return made

    def _gone(self, size):
        self.on_device -= size

    def pinned(self, size):
        if self.limit is not None and sum(map(len, self.pieces)) + size > self.limit:
            raise RuntimeError("CUDA error: out of memory")
        self.pieces.append(torch.empty(size, dtype=torch.uint8))
        return self.pieces[-1]

    def is_pinned(self, tensor):
        storage = tensor.untyped_storage().data_ptr()
        return any(piece.untyped_storage().data_ptr() == storage for piece in self.pieces)

    def mark(self):
        self.moment += 1
        return self.moment

    def copy(self, pairs, after):
        base = pairs[0][0].untyped_storage().data_ptr()
        last = self.readable[base]
        assert last is not None and after > last, "a buffer is written to while it is read"
        for target, source in pairs:
            assert target.dtype == source.dtype and source.device.type == "cpu"
            assert target.storage_offset() * target.element_size() % 256 == 0, "a weight begins where none may"
            if target.is_floating_point():
                target.fill_(POISON)
            else:
                target.fill_(99)
        event = SimpleNamespace(pairs=pairs, done=False, base=base, size=sum(t.nbytes for t, _ in pairs))
        self.log.append(("copy", event.size))
        return event

    def wait(self, event):
        assert not event.done
        for target, source in event.pairs:
            target.copy_(source)
        event.done = True
        # From now on it is read; only a later mark allows to write to it again.
        self.readable[event.base] = self.moment
        self.log.append(("wait", event.size))

    def copied(self):
        return sum(size for what, size in self.log if what == "copy")


def small_stage_c(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = StageC(
        c_cond=24, c_hidden=[16, 16], nhead=[2, 2], blocks=[[2, 3], [3, 2]], c_clip_text=20, c_clip_text_pooled=20,
        c_clip_img=12, c_clip_seq=2,
    )  # fmt: skip
    return _random(model, dtype)


def small_stage_b(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = StageB(
        c_cond=24, c_hidden=[8, 16], nhead=[-1, 2], blocks=[[1, 2], [2, 1]], block_repeat=[[1, 1], [3, 2]],
        level_config=["CT", "CTA"], dropout=[0.0, 0.0], c_clip=20, c_clip_seq=2,
    )  # fmt: skip
    return _random(model, dtype)


def _random(model, dtype):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def run_stage_c(model, steps=3, side=4, device="cpu"):
    """What the model predicts in each of some steps, two conditions at once."""
    generator = torch.Generator().manual_seed(5)
    text, pooled, x = (
        torch.randn(*shape, generator=generator).to(device) for shape in ((2, 5, 20), (2, 1, 20), (2, 16, side, side))
    )
    with torch.no_grad():
        prepared = model.prepare(torch.linspace(1, 0.1, steps, device=device), text, pooled)
        return torch.stack([model.step(x, prepared, index) for index in range(steps)])


def run_stage_b(model, steps=2, side=8, device="cpu"):
    generator = torch.Generator().manual_seed(6)
    latent, pooled, x = (
        torch.randn(*shape, generator=generator).to(device) for shape in ((2, 16, 3, 3), (2, 1, 20), (2, 4, side, side))
    )
    with torch.no_grad():
        prepared = model.prepare(torch.linspace(1, 0.1, steps, device=device), latent, pooled, (side, side))
        return torch.stack([model.step(x, prepared, index) for index in range(steps)])
