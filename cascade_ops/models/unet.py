"""The U-shaped network that Stage B and Stage C share: levels of blocks, skips, repeats, and prepare/step.

Everything that does not depend on the latent is computed once by ``prepare``; ``step`` then runs the network for one
of the prepared noise levels. The plain ``forward`` of a stage is a preparation for one noise level and one step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .in_place import Workspace
from .ip_adapter import DecoupledAttention
from .layers import (
    AttnBlock,
    FeedForwardBlock,
    ResBlock,
    TimestepBlock,
    as_channels_last,
    as_image,
    layer_norm,
    pointwise,
    resize,
    timestep_embedding,
)

# A control residual per residual block, in the order in which the network runs them; None where there is none.
ControlResiduals = Sequence[Tensor | None]


class InnerLevels(Protocol):
    """What the inner levels give the outer ones in a step: computed and kept, or taken from an earlier step.

    outer: how many levels are computed in any case.
    """

    @property
    def outer(self) -> int: ...

    def take(self) -> Tensor | None:
        """What the level below them gave, ``[B, rows, columns, c]``; None where it is to be computed."""

    def keep(self, given: Tensor) -> None:
        """Is told what the level below them gave where it was computed; nothing writes to it afterwards."""


@dataclass(frozen=True)
class Prepared:
    """What a run of the network needs beside the latent. ``N`` conditions, ``S`` noise levels.

    Attributes:
        modulations: one ``[S, N or 1, 1, 1, 2 c]`` tensor per timestep block.
        key_values: one ``[N, T, 2 c]`` tensor per attention block.
        added: ``[N, H, W, c]``, added to the embedded latent (Stage B's picture conditions), or None.
        decoupled: what IP-Adapters let the attention blocks read beside `key_values`.
    """

    modulations: tuple[Tensor, ...]
    key_values: tuple[Tensor, ...]
    added: Tensor | None = None
    decoupled: tuple[DecoupledAttention, ...] = ()

    def narrow(self, start: int, length: int) -> "Prepared":
        """The part for ``length`` conditions from ``start`` on, as views."""
        return Prepared(
            tuple(m if m.shape[1] == 1 else m.narrow(1, start, length) for m in self.modulations),
            tuple(kv.narrow(0, start, length) for kv in self.key_values),
            None if self.added is None else self.added.narrow(0, start, length),
            tuple(attention.narrow(start, length) for attention in self.decoupled),
        )


def per_level(value, levels: int, name: str) -> list:
    """Repeat a single setting for every level, or check that there is one per level."""
    values = list(value) if isinstance(value, list | tuple) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} entries for {levels} levels; give one value or one per level.")
    return values


class CascadeUNet(nn.Module):
    """Base of Stage B and Stage C; they add their conditions and the layers that change resolution.

    Args:
        c_in, c_out: channels of the latent that goes in and of the prediction.
        c_r: width of the noise-level embedding.
        patch_size: pixels of the latent that make one token edge.
        c_cond: width of the condition tokens.
        c_hidden, nhead, level_config: width, attention heads and block letters per level, outermost first
            (C residual, T timestep, A attention, F feed-forward); heads are ignored without an A.
        blocks, block_repeat: ``[down, up]``, down outermost first, up deepest first.
        t_conds: names of the size conditions.
        downscaler, upscaler: build the layer from ``level - 1`` to ``level``, and back; NCHW in and out.
    """

    def __init__(
        self,
        *,
        c_in: int,
        c_out: int,
        c_r: int,
        patch_size: int,
        c_cond: int,
        c_hidden: Sequence[int],
        nhead: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block_repeat: Sequence[Sequence[int]] | None,
        level_config: Sequence[str],
        kernel_size: int,
        dropout: float | Sequence[float],
        self_attn: bool | Sequence[bool],
        t_conds: Sequence[str],
        downscaler: Callable[[int], nn.Module],
        upscaler: Callable[[int], nn.Module],
    ):
        super().__init__()
        levels = len(c_hidden)
        self.c_r, self.c_cond, self.patch_size = c_r, c_cond, patch_size
        self.c_hidden, self.t_conds = list(c_hidden), list(t_conds)
        nhead, level_config = per_level(nhead, levels, "nhead"), per_level(level_config, levels, "level_config")
        dropout, self_attn = per_level(dropout, levels, "dropout"), per_level(self_attn, levels, "self_attn")
        repeats = block_repeat or [[1] * levels, [1] * levels]
        for name, pair in (("blocks", blocks), ("block_repeat", repeats)):
            if [len(side) for side in pair] != [levels, levels]:
                raise ValueError(f"{name} is {pair}; give [down, up] with {levels} numbers each, one per level.")

        def block(letter: str, level: int, c_skip: int) -> nn.Module:
            c = c_hidden[level]
            if letter == "C":
                return ResBlock(c, c_skip, kernel_size, dropout[level])
            if letter == "T":
                return TimestepBlock(c, c_r, self.t_conds)
            if letter == "A":
                return AttnBlock(c, c_cond, nhead[level], self_attn[level], dropout[level])
            if letter == "F":
                return FeedForwardBlock(c, dropout[level])
            raise ValueError(f"level_config has the letter {letter!r}; the blocks are C, T, A and F.")

        def level_blocks(level: int, count: int, c_skip: int) -> nn.ModuleList:
            letters = level_config[level] * count
            return nn.ModuleList(block(letter, level, c_skip if i == 0 else 0) for i, letter in enumerate(letters))

        def repeat_mappers(level: int, repeat: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(c_hidden[level], c_hidden[level], 1) for _ in range(repeat - 1))

        up_levels = list(reversed(range(levels)))
        self.embedding = nn.Sequential(nn.PixelUnshuffle(patch_size), nn.Conv2d(c_in * patch_size**2, c_hidden[0], 1))
        self.down_blocks = nn.ModuleList(level_blocks(i, blocks[0][i], 0) for i in range(levels))
        self.down_downscalers = nn.ModuleList(
            nn.Identity() if i == 0 else nn.Sequential(nn.Identity(), downscaler(i)) for i in range(levels)
        )
        self.down_repeat_mappers = nn.ModuleList(repeat_mappers(i, repeats[0][i]) for i in range(levels))
        self.up_blocks = nn.ModuleList(
            level_blocks(level, blocks[1][i], 0 if i == 0 else c_hidden[level]) for i, level in enumerate(up_levels)
        )
        self.up_upscalers = nn.ModuleList(
            nn.Identity() if level == 0 else nn.Sequential(nn.Identity(), upscaler(level)) for level in up_levels
        )
        self.up_repeat_mappers = nn.ModuleList(
            repeat_mappers(level, repeats[1][i]) for i, level in enumerate(up_levels)
        )
        self.clf = nn.Sequential(
            nn.Identity(), nn.Conv2d(c_hidden[0], c_out * patch_size**2, 1), nn.PixelShuffle(patch_size)
        )
        self.residual_depth = sum(blocks[0])

    def init_weights(self) -> None:
        """The release's initialisation: Xavier, residual branches scaled by depth, modulations and output zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock | FeedForwardBlock):
                with torch.no_grad():
                    module.channelwise[-1].weight.mul_(math.sqrt(1 / self.residual_depth))
            elif isinstance(module, TimestepBlock):
                for mapper in module.children():
                    nn.init.zeros_(mapper.weight)
        nn.init.xavier_uniform_(self.embedding[1].weight, 0.02)
        nn.init.zeros_(self.clf[1].weight)

    # What the stream of the last level is divided by, see `float16`.
    stream_scale: float = 1.0

    # Where the layers cast their weights themselves, what they cast them to.
    compute_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in: that of the weights, unless `compute_dtype` says another."""
        return self.compute_dtype or self.clf[1].weight.dtype

    def blocks_of(self, kind: type) -> list[nn.Module]:
        """All blocks of one class, in the order in which a pass without repeats runs them."""
        return [block for level in (*self.down_blocks, *self.up_blocks) for block in level if isinstance(block, kind)]

    def token_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent of this size.

        Raises:
            ValueError: the size is not a multiple of the patch.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"A latent of {width} x {height} was given; width and height must be multiples of {self.patch_size}."
            )
        return height // self.patch_size, width // self.patch_size

    def prepare_blocks(
        self,
        timesteps: Tensor,
        condition: Tensor,
        t_conds: dict[str, Tensor | None],
        decoupled: Sequence[DecoupledAttention] = (),
    ) -> Prepared:
        """Modulations and condition keys and values of every block.

        Args:
            timesteps: noise conditions 0..1, ``[S]`` or ``[S, N]``.
            condition: condition tokens ``[N, T, c_cond]``.
            t_conds: values ``[N]`` of the size conditions by name; None counts as 0.
            decoupled: of IP-Adapters, each for the ``N`` conditions or for one.
        """
        levels = timesteps.float()
        if levels.ndim == 1:
            levels = levels[:, None]
        unknown = [name for name, value in t_conds.items() if value is not None and name not in self.t_conds]
        if unknown:
            raise ValueError(f"The condition {unknown[0]!r} was given; this model knows {self.t_conds or 'none'}.")
        embeddings = [timestep_embedding(levels, self.c_r)]
        for name in self.t_conds:
            value = t_conds.get(name)
            value = levels.new_zeros(1) if value is None else torch.as_tensor(value, device=levels.device).float()
            embeddings.append(timestep_embedding(value.reshape(1, -1).expand(len(levels), -1), self.c_r))
        embeddings = [embedding.to(self.dtype) for embedding in embeddings]
        key_values = tuple(block.prepare(condition) for block in self.blocks_of(AttnBlock))
        for attention in decoupled:
            attention.check(key_values)
        return Prepared(
            tuple(block.prepare(embeddings) for block in self.blocks_of(TimestepBlock)),
            key_values,
            decoupled=tuple(decoupled),
        )

    def step(
        self,
        x: Tensor,
        prepared: Prepared,
        index: int,
        control: ControlResiduals | None = None,
        inner: InnerLevels | None = None,
    ) -> Tensor:
        """Predict the target for latents ``x`` at the prepared noise level ``index``.

        Args:
            x: ``[B, c_in, H, W]``.
            prepared: for ``B`` conditions, or for one that all latents share.
            control: residuals ``[B or 1, c, h, w]`` added before the residual blocks, any size.
            inner: lets the inner levels be left out, an approximation; not together with `control`.

        Returns:
            ``[B, c_out, H, W]`` in the dtype of the weights.
        """
        self.token_size(*x.shape[-2:])
        modulations = {
            block: modulation[index]
            for block, modulation in zip(self.blocks_of(TimestepBlock), prepared.modulations, strict=True)
        }
        key_values = dict(zip(self.blocks_of(AttnBlock), prepared.key_values, strict=True))
        places = {block: place for place, block in enumerate(key_values)}
        residuals = iter(control or ())
        # Blocks write over what they are given where nothing will ask for it again: autograd, or a compiler, which
        # makes its own arrangement. What a level leaves to a skip is not written to after that.
        keep = torch.is_grad_enabled() or self.training or torch.compiler.is_compiling()
        workspace = None if keep else Workspace()

        def run(block: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
            if isinstance(block, ResBlock):
                if skip is not None and x.shape[1:3] != skip.shape[1:3]:
                    x = resize(x, skip.shape[1:3])
                residual = next(residuals, None)
                if residual is not None:
                    if block.stream_scale != 1:
                        residual = residual / block.stream_scale
                    x = x + resize(residual.to(x.dtype).permute(0, 2, 3, 1), x.shape[1:3])
                return block(x, skip, workspace)
            if isinstance(block, TimestepBlock):
                return block(x, modulations[block], workspace)
            if isinstance(block, AttnBlock):
                beside = [attention.at(places[block], x.shape[1:3]) for attention in prepared.decoupled]
                return block(x, key_values[block], [one for one in beside if one is not None], workspace)
            return block(x, workspace)

        x = layer_norm(pointwise(as_channels_last(self.embedding[0](x.to(self.dtype))), self.embedding[1]))
        if prepared.added is not None:
            x = x + prepared.added

        def enlarged(i: int, x: Tensor) -> Tensor:
            return as_channels_last(self.up_upscalers[i][1](as_image(layer_norm(x))))

        given = None if inner is None else inner.take()
        levels = len(self.down_blocks) if given is None else inner.outer
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down_blocks):
            if level == levels:
                break
            if level > 0:
                x = as_channels_last(self.down_downscalers[level][1](as_image(layer_norm(x))))
            for mapper in (*self.down_repeat_mappers[level], None):
                for block in blocks:
                    x = run(block, x)
                if mapper is not None:
                    x = pointwise(x, mapper)
            skips.append(x)

        first = len(self.up_blocks) - levels
        if given is not None:
            x = enlarged(first - 1, given)
        for i, blocks in enumerate(self.up_blocks):
            if i < first:
                continue
            skip = skips.pop()
            for mapper in (*self.up_repeat_mappers[i], None):
                for j, block in enumerate(blocks):
                    x = run(block, x, skip if i > 0 and j == 0 else None)
                if mapper is not None:
                    x = pointwise(x, mapper)
            if inner is not None and i == len(self.up_blocks) - 1 - inner.outer:
                inner.keep(x)
            if i < len(self.up_blocks) - 1:
                x = enlarged(i, x)

        return self.clf[2](as_image(pointwise(layer_norm(x, self.stream_scale), self.clf[1])))
