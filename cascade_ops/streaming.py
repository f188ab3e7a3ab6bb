"""Run Stage B or Stage C on a device that their weights do not fit on: blocks come from main memory as they run.

The streamed network is the same one, with the same classes and the same tensors, and computes the same bits. Before a
block runs, its weights are in a buffer on the device; while it runs, the next block's are copied to another buffer, by
a stream of their own. The weights wait in pinned main memory, from which a GPU copies by itself.

What depends on a device is behind `Lane`, so that the order of copies is tested without one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .models.layers import AttnBlock, TimestepBlock
from .models.unet import CascadeUNet
from .streaming_plan import BUFFERS, SMALL, StreamingPlan, Weight, blocks_of, make_plan, step_order

# Pinned memory is handed out in powers of two, so weights are packed into pieces of that size.
_PINNED_PIECE = 256 * 2**20

Module = TypeVar("Module", bound=nn.Module)


class Lane(Protocol):
    """Memory of a device, the stream that computes on it, and another that copies to it."""

    device: torch.device

    def buffer(self, size: int) -> Tensor:
        """`size` bytes on the device, for `copy` to write to."""

    def pinned(self, size: int) -> Tensor:
        """`size` bytes of main memory that `copy` need not wait for."""

    def is_pinned(self, tensor: Tensor) -> bool: ...

    def mark(self) -> Any:
        """An event at this point of the computation."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy to each first from each second tensor once the event `after` is past; gives the event of the end."""

    def wait(self, event: Any) -> None:
        """Let the computation go on only when `event` is past."""


class CudaLane:
    """A CUDA device, with a stream of its own for copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        # Without this its memory would be given to others while a copy to it is under way.
        buffer.record_stream(self._copies)
        return buffer

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.no_grad(), torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


class Slot(NamedTuple):
    """Where a weight goes while its block is away or computes: the layer's dictionary, the name, the weight."""

    place: dict[str, Tensor | None]
    name: str
    source: Tensor
    absent: Tensor


@dataclass(frozen=True, eq=False)
class Job:
    """The weights of one block to bring, for a step or for the preparation."""

    slots: tuple[Slot, ...]

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Its weights' places in a buffer of bytes."""
        views, start = [], 0
        for slot in self.slots:
            count = slot.source.numel() * slot.source.element_size()
            views.append(buffer[start : start + count].view(slot.source.dtype).view(slot.source.shape))
            start += Weight(slot.place, slot.name, slot.source).room
        return views


@dataclass
class _Coming:
    """A job under way: its buffer, its weights in there, and the event of their arrival."""

    job: Job
    buffer: Tensor
    views: list[Tensor]
    arrived: Any


class Ring:
    """Buffers on the device that jobs take in turns.

    prepare, step: the jobs as they are foreseen, in the preparation and then again and again in steps. What is foreseen
    is copied ahead; a job out of turn is copied when it is asked for.
    """

    def __init__(self, lane: Lane, size: int, prepare: Sequence[Job], step: Sequence[Job]) -> None:
        self._lane = lane
        self._order = [*prepare, *step]
        self._again = len(prepare) if step else 0
        self._next = 0
        start = lane.mark()
        self._free: deque[tuple[Tensor, Any]] = deque((lane.buffer(size), start) for _ in range(BUFFERS))
        self._coming: deque[_Coming] = deque()
        self._inside: _Coming | None = None

    def enter(self, job: Job) -> None:
        """Put the job's weights into their layers, on the device."""
        self._take_out()  # what an interruption left inside
        if not self._coming or self._coming[0].job is not job:
            self._turn_to(job)
        self._inside = coming = self._coming.popleft()
        self._lane.wait(coming.arrived)
        for slot, view in zip(job.slots, coming.views, strict=True):
            slot.place[slot.name] = view

    def leave(self) -> None:
        """Take them out again, and bring the next ones to their place."""
        self._take_out()
        self._bring()

    def _take_out(self) -> None:
        if self._inside is not None:
            for slot in self._inside.job.slots:
                slot.place[slot.name] = slot.absent
            self._free.append((self._inside.buffer, self._lane.mark()))
            self._inside = None

    def _turn_to(self, job: Job) -> None:
        # Copies follow each other, so a buffer that is on its way can be written to anew.
        self._free.extend((coming.buffer, self._lane.mark()) for coming in self._coming)
        self._coming.clear()
        length = len(self._order)
        ahead = ((self._next + step) % length for step in range(length))
        self._next = next(number for number in ahead if self._order[number] is job)
        self._bring()

    def _bring(self) -> None:
        while self._free:
            job = self._order[self._next]
            self._next = self._next + 1 if self._next + 1 < len(self._order) else self._again
            buffer, left = self._free.popleft()
            views = job.views(buffer)
            pairs = [(view, slot.source) for view, slot in zip(views, job.slots, strict=True)]
            self._coming.append(_Coming(job, buffer, views, self._lane.copy(pairs, left)))


def streamed(network: CascadeUNet, lane: Lane, budget: int, small: int = SMALL) -> CascadeUNet:
    """A network that computes what `network` does on the lane's device, with at most `budget` bytes of it for weights.

    It shares the weights and keeps them in main memory, pinned from now on. Its attribute `streaming` is the plan.
    For one run at a time. Raises ValueError where the budget is too small, see `streaming_plan.make_plan`.
    """
    plan = make_plan(network, budget, small)
    copy = same_structure(network)
    blocks = blocks_of(copy, small)
    away = [weight for block in blocks for weight in block.once]
    away += [weight for block, stays in zip(blocks, plan.stays, strict=True) if not stays for weight in block.each_step]
    pin([weight.tensor for weight in away], lane)
    slots = {id(weight.tensor): _taken_out(weight) for weight in away}
    _move(copy, lane.device, {id(slot.absent) for slot in slots.values()})

    def job(weights: Sequence[Weight]) -> Job | None:
        found = tuple(slots[id(weight.tensor)] for weight in weights if id(weight.tensor) in slots)
        return Job(found) if found else None

    prepare = [job(block.prepares) for block in blocks]
    step = [job(block.each_step) for block in blocks]
    kinds = [
        number
        for kind in (AttnBlock, TimestepBlock)
        for number, block in enumerate(blocks)
        if isinstance(block.module, kind)
    ]
    foreseen = [prepare[number] for number in kinds], [step[number] for number in step_order(copy)]
    ring = Ring(lane, plan.buffer, *([each for each in order if each is not None] for order in foreseen))
    for block, before, during in zip(blocks, prepare, step, strict=True):
        if before is not None:
            # In place of the method, and not a reference to the block, which would keep itself alive.
            block.module.__dict__["prepare"] = partial(_prepare, weakref.ref(block.module), ring, before)
        if during is not None:
            block.module.register_forward_pre_hook(partial(_enter, ring, during))
            block.module.register_forward_hook(partial(_leave, ring))
    copy.__dict__["streaming"] = plan
    return copy


def streaming_plan(network: object) -> StreamingPlan | None:
    """The plan of a network that `streamed` made; None for any other."""
    return getattr(network, "streaming", None)


def same_structure(module: Module) -> Module:
    """A module of the same classes over the same tensors, whose layers can be given others without changing it."""
    return _restructured(module, {})


def _restructured(module: Module, made: dict[int, nn.Module]) -> Module:
    # No closure that calls itself: it would hold what it made until garbage is collected.
    if id(module) not in made:
        made[id(module)] = new = module.__class__.__new__(module.__class__)
        for name, value in module.__dict__.items():
            # Tables of weights, layers and hooks are its own.
            new.__dict__[name] = value.copy() if isinstance(value, dict) else value
        for name, inner in module._modules.items():
            new._modules[name] = None if inner is None else _restructured(inner, made)
    return made[id(module)]  # type: ignore[return-value]


@torch.no_grad()
def pin(tensors: Sequence[Tensor], lane: Lane) -> None:
    """Move tensors in main memory to pinned main memory: the same tensors with the same values, and no second copy.

    Where the system grants no more pinned memory, the rest stays as it is: copies from there are slower.
    """
    waiting = [tensor for tensor in tensors if not lane.is_pinned(tensor)]
    sizes = [Weight({}, "", tensor).room for tensor in waiting]
    while waiting:
        count, filled = 0, 0
        while count < len(waiting) and (count == 0 or filled + sizes[count] <= _PINNED_PIECE):
            filled += sizes[count]
            count += 1
        try:
            piece = lane.pinned(filled)
        except RuntimeError:
            return
        start = 0
        for tensor, size in zip(waiting[:count], sizes[:count], strict=True):
            view = piece[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            tensor.data = view.copy_(tensor)
            start += size
        del waiting[:count], sizes[:count]


def _taken_out(weight: Weight) -> Slot:
    # On the meta device it says its shape and dtype, and computing with it fails.
    absent = torch.empty_like(weight.tensor, device="meta")
    weight.place[weight.name] = absent
    return Slot(weight.place, weight.name, weight.tensor, absent)


def _move(module: nn.Module, device: torch.device, except_for: set[int]) -> None:
    """Put a module's tensors on a device, in place of those that it shares; tied ones stay tied."""
    moved: dict[int, Tensor] = {}
    for layer in module.modules():
        places: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
        for place in places:
            for name, tensor in place.items():
                if tensor is None or id(tensor) in except_for:
                    continue
                if id(tensor) not in moved:
                    new = tensor.detach().to(device)
                    moved[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
                place[name] = moved[id(tensor)]


def _prepare(block: Callable[[], Any], ring: Ring, job: Job, *arguments: Any, **more: Any) -> Any:
    module = block()
    ring.enter(job)
    prepared = type(module).prepare(module, *arguments, **more)
    ring.leave()
    return prepared


def _enter(ring: Ring, job: Job, *_: Any) -> None:
    ring.enter(job)


def _leave(ring: Ring, *_: Any) -> None:
    ring.leave()
