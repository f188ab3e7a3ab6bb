"""Stage A in tiles: a picture of any size in the memory of a small one, without seams.

Stage A has no global layer. A pixel depends on the latent within a few cells of it (14 in the published decoder), so
each tile is computed with that much of its surroundings, which is cut off again: what is left is what the whole picture
gives, up to the rounding of the convolutions. Nothing has to be blended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .models import StageA
from .models.stage_a import MixingBlock
from .sizes import STAGE_A_COMPRESSION

Done = Callable[[int], None]


class Tile(NamedTuple):
    """A part of a latent in cells.

    kept: the rows and columns that it contributes. seen: those it is computed from.
    """

    kept: tuple[slice, slice]
    seen: tuple[slice, slice]


def decoding_reach(model: StageA) -> int:
    """Cells of the latent around a cell that its pixels depend on: 14 for the published decoder."""
    reach, scale = 0.0, 1
    for block in model.up_blocks:
        if isinstance(block, MixingBlock):
            reach += 1 / scale
        elif isinstance(block, nn.ConvTranspose2d):
            # Four wide with a stride of two: an output reads a cell and one beside it.
            reach += 1 / scale
            scale *= 2
    return math.ceil(reach)


def encoding_reach(model: StageA) -> int:
    """Cells of the latent around a cell whose pixels it depends on: 2 for the published encoder."""
    reach, scale = 0.0, model.compression // 2
    for block in model.down_blocks:
        if isinstance(block, MixingBlock):
            reach += 1 / scale
        elif isinstance(block, nn.Conv2d):
            # Four wide with a stride of two: an output reads its own two cells and one on either side.
            reach += 1 / scale
            scale //= 2
    return math.ceil(reach)


def cells_per_tile(tile: int, size: Sequence[int]) -> tuple[int, int]:
    """Cells ``(rows, columns)`` of a tile of `tile` pixels, 0 for everything, in a latent of `size`.

    Raises ValueError for a tile smaller than a cell.
    """
    if tile and tile < STAGE_A_COMPRESSION:
        raise ValueError(
            f"A tile of {tile} pixels was asked for, expected 0 (the whole picture at once) or at least "
            f"{STAGE_A_COMPRESSION}: 512 suits most graphics cards."
        )
    side = tile // STAGE_A_COMPRESSION
    return (min(size[0], side), min(size[1], side)) if tile else (size[0], size[1])


def tile_count(size: Sequence[int], tile: int) -> int:
    """Into how many tiles of `tile` pixels a latent of `size` ``(rows, columns)`` is cut."""
    rows, columns = cells_per_tile(tile, size)
    return math.ceil(size[0] / rows) * math.ceil(size[1] / columns)


def largest_tile(size: tuple[int, int], tile: int, reach: int) -> tuple[int, int]:
    """Rows and columns of cells that the largest tile of a latent of `size` is computed from."""
    seen = [seen for _, seen in tiles_of(size, tile, reach)]
    return max(part[0].stop - part[0].start for part in seen), max(part[1].stop - part[1].start for part in seen)


def tiles_of(size: tuple[int, int], tile: int, reach: int) -> Iterator[Tile]:
    """The tiles of a latent of `size` ``(rows, columns)``, row by row, which see `reach` cells around them.

    Tiles in a row are of equal size, to a cell, and never larger than `tile` pixels.
    """
    cuts = [_cuts(length, part) for length, part in zip(size, cells_per_tile(tile, size), strict=True)]
    for rows in cuts[0]:
        for columns in cuts[1]:
            kept = rows, columns
            around_rows, around_columns = (
                slice(max(0, part.start - reach), min(length, part.stop + reach))
                for part, length in zip(kept, size, strict=True)
            )
            yield Tile(kept, (around_rows, around_columns))


def _cuts(length: int, part: int) -> list[slice]:
    count = math.ceil(length / part)
    return [slice(i * length // count, (i + 1) * length // count) for i in range(count)]


@torch.no_grad()
def tiled_decode(
    model: StageA, latent: Tensor, tile: int = 0, done: Done | None = None, device: torch.device | None = None
) -> Tensor:
    """`StageA.decode` in tiles: latents ``[B, c_latent, h, w]`` to ``[B, 3, 4 h, 4 w]`` float32 in main memory.

    The latent may be anywhere; a tile at a time is moved to `device`, where the model computes (None: where its weights
    are). tile: pixels a side, 0 for the whole picture at once. done: told after each how many are done, of
    `tile_count`; an exception it raises ends the run.
    """
    scale = model.compression
    size = (latent.shape[2], latent.shape[3])
    device = device or next(model.parameters()).device
    picture = torch.empty(len(latent), 3, size[0] * scale, size[1] * scale)
    for number, (kept, seen) in enumerate(tiles_of(size, tile, decoding_reach(model)), start=1):
        decoded = model.decode(latent[_cells(seen)].to(device))
        picture[_cells(kept, scale)] = decoded[_cells(_inside(kept, seen), scale)].float().cpu()
        if done is not None:
            done(number)
    return picture


@torch.no_grad()
def tiled_encode(
    model: StageA, image: Tensor, tile: int = 0, done: Done | None = None, device: torch.device | None = None
) -> Tensor:
    """`StageA.encode` in tiles: pictures ``[B, 3, H, W]``, 0..1, to latents ``[B, c_latent, H / 4, W / 4]``.

    The result is float32 in main memory. See `tiled_decode` for `tile`, `done` and `device`.

    Raises:
        ValueError: the size is not a multiple of the compression.
    """
    scale = model.compression
    if image.shape[2] % scale or image.shape[3] % scale:
        raise ValueError(
            f"A picture of {image.shape[3]} x {image.shape[2]} was given, expected multiples of {scale} for Stage A: "
            "resize it."
        )
    size = (image.shape[2] // scale, image.shape[3] // scale)
    device = device or next(model.parameters()).device
    latent = torch.empty(len(image), model.c_latent, *size)
    for number, (kept, seen) in enumerate(tiles_of(size, tile, encoding_reach(model)), start=1):
        encoded, _, _ = model.encode(image[_cells(seen, scale)].to(device))
        latent[_cells(kept)] = encoded[_cells(_inside(kept, seen))].float().cpu()
        if done is not None:
            done(number)
    return latent


def _inside(kept: tuple[slice, slice], seen: tuple[slice, slice]) -> tuple[slice, slice]:
    """`kept`, counted from where `seen` begins."""
    rows, columns = (
        slice(one.start - other.start, one.stop - other.start) for one, other in zip(kept, seen, strict=True)
    )
    return rows, columns


def _cells(part: tuple[slice, slice], scale: int = 1) -> tuple[EllipsisType, slice, slice]:
    """The index of a part of a tensor ``[..., rows, columns]`` with `scale` of them for each cell."""
    rows, columns = (slice(each.start * scale, each.stop * scale) for each in part)
    return ..., rows, columns
