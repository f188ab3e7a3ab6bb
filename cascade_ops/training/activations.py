"""How much memory the activations of a training step take, counted without doing the step.

The step runs on the meta device, where tensors have shapes and no memory, while every tensor that autograd keeps for
the way back is counted once. What PyTorch's kernels keep inside themselves is not seen; attention is counted as the
memory-efficient kernels do it (Dao et al., "FlashAttention", 2022): query, key, value and result, no matrix of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What autocast runs in 16 bits on CUDA, of what the networks here call; and what it lifts to float32.
_LOW = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d, F.conv2d, F.conv_transpose2d, torch.matmul, Tensor.matmul,
    Tensor.__matmul__, torch.bmm, torch.addmm, torch.baddbmm,
)  # fmt: skip
_HIGH = (F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss, F.l1_loss, F.cross_entropy)


@dataclass
class Kept:
    """Bytes that autograd keeps for the way back.

    plain: as the step is. checkpointed: where every block keeps its input only, and the largest one is computed again.
    frozen: weights that the step reads and that ask for no gradient.
    """

    plain: int
    checkpointed: int
    frozen: list[nn.Parameter]


def kept_by(step: Callable[[], Any], blocks: Iterable[nn.Module], autocast: bool, owned: Iterable[Tensor]) -> Kept:
    """Count what `step` makes autograd keep.

    step: a forward pass; its tensors may be on any device. blocks: what gradient checkpointing would run again.
    autocast: count as bfloat16 autocast would have it. owned: weights and buffers, which are counted elsewhere.
    """
    count = _Count({_storage(tensor) for tensor in owned})
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(partial(_enter, count), with_kwargs=True))
        handles.append(block.register_forward_hook(partial(_leave, count)))
    mode = _Kernels(autocast)
    try:
        saving = torch.autograd.graph.saved_tensors_hooks(count.keep, _as_it_is)
        with saving, StayingThere(), mode, _autocast_of(mode):
            result = step()
    finally:
        for handle in handles:
            handle.remove()
    del result
    # Only now is it known which frozen weights there are.
    weights = {_storage(parameter) for parameter in mode.frozen.values()}
    for sizes in (count.outside, count.inputs, *count.inside):
        for storage in weights & sizes.keys():
            del sizes[storage]
    held = {**count.outside, **count.inputs}
    again = [sum(size for key, size in inside.items() if key not in held) for inside in count.inside]
    largest = max(again, default=0)
    copies = sum(_size(copy) for copy in mode.copies.values())
    everything = {**count.outside, **{key: size for inside in count.inside for key, size in inside.items()}}
    return Kept(sum(everything.values()), sum(held.values()) + max(largest, copies), list(mode.frozen.values()))


@dataclass
class _Count:
    """Sizes by storage: kept outside of the blocks, by each run of a block, and the blocks' inputs."""

    owned: set[int]
    outside: dict[int, int] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)
    inside: list[dict[int, int]] = field(default_factory=list)
    within: bool = False
    alive: list[Tensor] = field(default_factory=list)  # a freed storage's number may come again

    def keep(self, tensor: Tensor) -> Tensor:
        self._add(self.inside[-1] if self.within else self.outside, tensor)
        return tensor

    def enter(self, values: Iterable[Any]) -> None:
        self.within = True
        self.inside.append({})
        for value in values:
            if isinstance(value, Tensor):
                self._add(self.inputs, value)

    def _add(self, sizes: dict[int, int], tensor: Tensor) -> None:
        key = _storage(tensor)
        if key not in self.owned:
            sizes[key] = tensor.untyped_storage().nbytes()
            self.alive.append(tensor.detach())


class StayingThere(TorchFunctionMode):
    """Tensors on the meta device stay there when they are brought to main memory.

    What asks for their numbers is told 1 for a single one, and finds none that are chosen by a condition.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            return args[0]
        if func is Tensor.to:
            args = tuple("meta" if str(value) == "cpu" else value for value in args)
            kwargs = {name: "meta" if str(value) == "cpu" else value for name, value in kwargs.items()}
        elif func in (Tensor.item, Tensor.__float__, Tensor.__int__):
            return 1.0 if func is Tensor.__float__ else 1
        elif func is Tensor.nonzero:
            places = torch.empty(0, args[0].ndim, dtype=torch.int64, device="meta")
            return places.unbind(1) if kwargs.get("as_tuple") else places
        elif func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0].new_empty(0, *args[0].shape[args[1].ndim :])
        return func(*args, **kwargs)


class _Kernels(TorchFunctionMode):
    """Attention that keeps what the fused kernels keep, and autocast, which has no meta device."""

    def __init__(self, autocast: bool):
        super().__init__()
        self.autocast = autocast
        self.copies: dict[int, Tensor] = {}
        self.frozen: dict[int, nn.Parameter] = {}
        self._sources: list[Tensor] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        for value in (*args, *kwargs.values()):
            if isinstance(value, nn.Parameter) and not value.requires_grad:
                self.frozen[id(value)] = value
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._low(tensor) for tensor in args[:3])
            return _FusedAttention.apply(query, key, value)
        if self.autocast and func in _LOW:
            args = tuple(self._low(value) for value in args)
            kwargs = {name: self._low(value) for name, value in kwargs.items()}
        elif self.autocast and func in _HIGH:
            args = tuple(_high(value) for value in args)
        return func(*args, **kwargs)

    def _low(self, value: Any) -> Any:
        if not self.autocast or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        # A weight is cast once in a step.
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(torch.bfloat16)
            self._sources.append(value)
        return self.copies[id(value)]


@contextmanager
def _autocast_of(mode: _Kernels) -> Iterator[None]:
    """Let ``torch.autocast`` switch `mode` for the meta device, which PyTorch's own refuses."""
    original = torch.autocast

    @contextmanager
    def switched(enabled: bool) -> Iterator[None]:
        before, mode.autocast = mode.autocast, enabled
        try:
            yield
        finally:
            mode.autocast = before

    def autocast(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        return switched(enabled) if device_type == "meta" else original(device_type, *args, enabled=enabled, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


def _high(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _FusedAttention(torch.autograd.Function):
    """Shapes and kept tensors of fused attention; the numbers are none."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _enter(count: _Count, block: nn.Module, args: tuple, kwargs: dict) -> None:
    count.enter([*args, *kwargs.values()])


def _leave(count: _Count, block: nn.Module, args: tuple, output: Any) -> None:
    count.within = False


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
