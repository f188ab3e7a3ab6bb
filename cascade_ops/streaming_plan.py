"""Which weights of Stage B or Stage C stay on the device and which are copied to it in every step.

A network is cut into its blocks. Beside them stands what is small or outside of blocks; it always stays. Of a block,
some weights are read once per run, when the conditions are prepared (all of a timestep block, the condition mapper of
an attention block): they are never kept. The others are read in each step, as often as the step runs the block, and
stay as far as the budget goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .free_memory import gigabytes
from .models.layers import AttnBlock, TimestepBlock
from .models.unet import CascadeUNet

# Smaller tensors stay on the device: a copy of its own for each would cost more time than they cost memory.
SMALL = 256 * 2**10
# While one block computes in its buffer, the next one's weights come into the other.
BUFFERS = 2
# Where a tensor may begin in a buffer.
_ALIGNMENT = 256


class Weight(NamedTuple):
    """A tensor of a layer; `place` is the layer's dictionary that holds it under `name`."""

    place: dict[str, Tensor | None]
    name: str
    tensor: Tensor

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def room(self) -> int:
        """Bytes that it takes in a buffer."""
        return -(-self.size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, eq=False)
class Block:
    """The large weights of a block.

    once: read when the conditions are prepared and not in a step. each_step: read in a step, and by an attention block
    in the preparation too. times: how often a step runs the block.
    """

    module: nn.Module
    once: tuple[Weight, ...]
    each_step: tuple[Weight, ...]
    times: int

    @property
    def step_size(self) -> int:
        """Bytes that a step copies where the block does not stay, each time that it runs the block."""
        return sum(weight.size for weight in self.each_step)

    @property
    def step_room(self) -> int:
        """Bytes of a buffer that they take."""
        return sum(weight.room for weight in self.each_step)

    @property
    def prepares(self) -> tuple[Weight, ...]:
        """What its preparation reads; nothing where it has none."""
        return (*self.once, *self.each_step) if isinstance(self.module, (AttnBlock, TimestepBlock)) else ()

    @property
    def prepare_room(self) -> int:
        return sum(weight.room for weight in self.prepares)


@dataclass(frozen=True)
class StreamingPlan:
    """What stays and what is copied. All sizes in bytes.

    total: all weights. resident: those that stay on the device. buffer: one of the `BUFFERS` that the others pass
    through. per_step: copied in each step (each of its passes, if guidance needs two). once: copied when the
    conditions are prepared. stays: for each block, in the order of `blocks_of`, whether its weights stay.
    """

    total: int
    resident: int
    buffer: int
    per_step: int
    once: int
    stays: tuple[bool, ...]

    @property
    def needed(self) -> int:
        """Bytes of the device for weights and buffers."""
        return self.resident + BUFFERS * self.buffer

    @property
    def streamed(self) -> int:
        """Bytes of the weights that do not stay."""
        return self.total - self.resident

    def describe(self) -> str:
        """``streamed: 5.1 GB of 7.2 GB``"""
        return f"streamed: {gigabytes(self.streamed)} of {gigabytes(self.total)} of its weights"


def blocks_of(network: CascadeUNet, small: int = SMALL) -> list[Block]:
    """The blocks of a network, in the order in which a pass without repeats runs them."""
    return [_block(block, times, small) for blocks, times in _levels(network) for block in blocks]


def step_order(network: CascadeUNet) -> list[int]:
    """The numbers of the blocks as a step runs them, repeats included."""
    order, first = [], 0
    for blocks, times in _levels(network):
        order += list(range(first, first + len(blocks))) * times
        first += len(blocks)
    return order


def _levels(network: Any) -> Iterator[tuple[list[nn.Module], int]]:
    """The blocks of each level, those of the way down first, and how often a step runs them."""
    down, up = (network.down_blocks, network.down_repeat_mappers), (network.up_blocks, network.up_repeat_mappers)
    for levels, mappers in (down, up):
        for blocks, repeats in zip(levels, mappers, strict=True):
            yield list(blocks), len(repeats) + 1


def make_plan(network: CascadeUNet, budget: int, small: int = SMALL) -> StreamingPlan:
    """The plan that copies least in a step and needs at most `budget` bytes of the device.

    Blocks that a step runs more often stay first, then larger ones; of equal blocks those that stay are spread evenly,
    so that copies go on while they compute. A larger buffer leaves less for blocks: all sizes are tried.

    Raises ValueError where not even the buffers and what always stays fit.
    """
    blocks = blocks_of(network, small)
    total, always = _sizes(network, blocks)
    plans = []
    for buffer in _buffers(blocks):
        stays = _chosen(blocks, budget - always - BUFFERS * buffer, buffer)
        if stays is None:
            continue
        paired = list(zip(blocks, stays, strict=True))
        plans.append(
            StreamingPlan(
                total,
                always + sum(block.step_size for block, stay in paired if stay),
                buffer,
                sum(block.times * block.step_size for block, stay in paired if not stay),
                sum(weight.size for block, stay in paired for weight in (block.once if stay else block.prepares)),
                tuple(stays),
            )
        )
    if not plans:
        raise ValueError(
            f"Streaming its weights needs at least {gigabytes(least_bytes(network, small))} of free memory on the "
            f"device and {gigabytes(max(budget, 0))} can be had: close other programs that use the device, or choose "
            "a smaller model or picture."
        )
    return min(plans, key=lambda plan: (plan.per_step, plan.needed))


def least_bytes(network: CascadeUNet, small: int = SMALL) -> int:
    """The smallest budget that `make_plan` accepts."""
    blocks = blocks_of(network, small)
    _, always = _sizes(network, blocks)
    return always + min(
        BUFFERS * buffer + sum(block.step_size for block in blocks if block.step_room > buffer)
        for buffer in _buffers(blocks)
    )


def _sizes(network: CascadeUNet, blocks: list[Block]) -> tuple[int, int]:
    """Bytes of all weights, and of those that no block can stream."""
    total = sum(weight.size for weight in _tensors(network))
    return total, total - sum(weight.size for block in blocks for weight in (*block.once, *block.each_step))


def _buffers(blocks: list[Block]) -> list[int]:
    """The sizes that a buffer may have: every preparation passes through it, and some or all steps."""
    least = max(block.prepare_room for block in blocks)
    return sorted({max(least, block.step_room) for block in blocks})


def _chosen(blocks: list[Block], room: int, buffer: int) -> list[bool] | None:
    """Whether each block stays; None where those too large for the buffer do not fit in the room."""
    stays = [not block.each_step or block.step_room > buffer for block in blocks]
    room -= sum(block.step_size for block, stay in zip(blocks, stays, strict=True) if stay)
    if room < 0:
        return None
    alike: dict[tuple[int, int], list[int]] = {}
    for number, block in enumerate(blocks):
        if not stays[number]:
            alike.setdefault((block.times, block.step_size), []).append(number)
    for (_, size), numbers in sorted(alike.items(), reverse=True):
        count = min(len(numbers), room // size)
        for place in range(count):
            stays[numbers[place * len(numbers) // count]] = True
        room -= count * size
    return stays


def _block(module: nn.Module, times: int, small: int) -> Block:
    large = [weight for weight in _tensors(module) if _streams(weight.tensor, small)]
    if isinstance(module, TimestepBlock):
        return Block(module, tuple(large), (), times)
    mapper = set()
    if isinstance(module, AttnBlock):
        mapper = {id(weight.tensor) for weight in _tensors(module.kv_mapper)}
    once = tuple(weight for weight in large if id(weight.tensor) in mapper)
    return Block(module, once, tuple(weight for weight in large if id(weight.tensor) not in mapper), times)


def _tensors(module: nn.Module) -> Iterator[Weight]:
    """All parameters and buffers, each once."""
    seen: set[int] = set()
    for layer in module.modules():
        places: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
        for place in places:
            for name, tensor in place.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield Weight(place, name, tensor)


def _streams(tensor: Tensor, small: int) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.is_contiguous()
    return plain and tensor.numel() * tensor.element_size() >= max(small, 1)
