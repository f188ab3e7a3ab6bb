"""Masks of pictures, in pixels: 1 is to be made anew, 0 is to be kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Farther from a picture's mask than any pixel of it.
_FAR = 1 << 20


def fitting_masks(mask: Tensor, count: int, height: int, width: int) -> Tensor:
    """A `MASK` ``[H, W]`` or ``[n, H, W]`` as float32 ``[1 or count, 1, H, W]``, of the shape of `count` pictures of
    ``height x width`` pixels but of any size.

    Raises:
        ValueError: a mask of another shape, or neither one mask nor one per picture.
    """
    masks = mask.detach().float().cpu().reshape(-1, 1, *mask.shape[-2:])
    rows, columns = masks.shape[-2:]
    if len(masks) not in (1, count) or abs(rows * width - columns * height) > max(height, width):
        raise ValueError(
            f"There are {len(masks)} masks of {columns} x {rows} for {count} pictures of {width} x {height}, expected "
            f"1 or {count} of the picture's size: paint the mask on this picture."
        )
    return masks


def picture_mask(mask: Tensor, count: int, height: int, width: int) -> Tensor:
    """A `MASK` at the size of the pictures, ``[1 or count, 1, height, width]``, 0..1: averaged where it is larger; see
    `fitting_masks`."""
    return resized_mask(fitting_masks(mask, count, height, width), height, width)


def resized_mask(masks: Tensor, height: int, width: int) -> Tensor:
    """``[n, 1, H, W]`` masks at another size, averaged over each pixel, so that ones stay ones and zeros zeros."""
    if masks.shape[-2:] != (height, width):
        masks = F.interpolate(masks, size=(height, width), mode="area")
    return masks.clamp(0, 1)


def feathered(mask: Tensor, grow: int = 0, feather: int = 0) -> Tensor:
    """Masks ``[n, H, W]`` made larger or smaller, then given a soft edge: float32 ``[n, H, W]``, 0..1.

    grow: pixels by which the masked part grows on all sides, with round corners; below 0 it shrinks, but not where it
    touches the picture's border. feather: width in pixels of the straight ramp from 1 to 0, which lies outside of the
    grown part.

    With either, what is masked at least a half counts as masked. With neither the mask comes back as it is, soft edges
    and all.
    """
    mask = mask.detach().float().cpu().clamp(0, 1)
    if not grow and not feather:
        return mask
    return torch.stack([_ramp(_beyond(one >= 0.5, grow, feather), grow, feather) for one in mask])


def _ramp(beyond: Tensor, grow: int, feather: int) -> Tensor:
    """1 up to `grow` pixels beyond the outline, 0 from ``grow + feather`` on."""
    if not feather:
        return (beyond <= grow).float()
    return (1 - (beyond - grow) / feather).clamp(0, 1)


def _beyond(masked: Tensor, grow: int, feather: int) -> Tensor:
    """How far each pixel's centre lies beyond the outline of bool ``[H, W]``, in pixels; inside of it below 0.

    Exact between `grow` and ``grow + feather``; farther away only known to be so.
    """
    beyond = torch.where(masked, -torch.inf, torch.inf)
    outside = grow + feather + 1
    if outside > 0:
        beyond = torch.where(masked, beyond, _distance(masked, outside) - 0.5)
    if grow < 0:
        beyond = torch.where(masked, 0.5 - _distance(~masked, 1 - grow), beyond)
    return beyond


def _distance(there: Tensor, reach: int) -> Tensor:
    """Euclidean distance to the nearest True of bool ``[H, W]``, exact up to `reach`; infinite where it is farther.

    First along the columns, then along the rows over all steps within reach (the separable transform of Saito and
    Toriwaki 1994).
    """
    height, width = there.shape
    rows = torch.arange(height)[:, None].expand(height, width)
    above = torch.where(there, rows, -_FAR).cummax(dim=0).values
    below = torch.where(there, rows, _FAR).flip(0).cummin(dim=0).values.flip(0)
    vertical = torch.minimum(rows - above, below - rows)
    squared = torch.where(vertical <= reach, vertical.float() ** 2, torch.inf)
    nearest = squared.clone()
    for step in range(1, min(reach, width - 1) + 1):
        cost = float(step * step)
        nearest[:, step:] = torch.minimum(nearest[:, step:], squared[:, :-step] + cost)
        nearest[:, :-step] = torch.minimum(nearest[:, :-step], squared[:, step:] + cost)
    return nearest.sqrt()


def padded_for_outpainting(
    image: Tensor, left: int, top: int, right: int, bottom: int, feather: int = 0
) -> tuple[Tensor, Tensor]:
    """Pictures ``[n, H, W, 3]`` with a border around them, and the mask of the border ``[1, H', W']``.

    left, top, right, bottom: pixels to add, 0 or more. In the border the pixels of the picture's edge go on, so that an
    encoder sees no edge where none is. The mask is 1 in it and falls to 0 over the first `feather` pixels of the old
    picture.

    Raises:
        ValueError: a negative side, or nothing to add.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(sides.values()) < 0 or not any(sides.values()):
        found = ", ".join(f"{name} {pixels}" for name, pixels in sides.items())
        raise ValueError(f"The border to add is {found}, expected 0 or more pixels and some side above 0: set a side.")
    padded = F.pad(image.permute(0, 3, 1, 2), (left, right, top, bottom), mode="replicate").permute(0, 2, 3, 1)
    mask = F.pad(torch.zeros(1, *image.shape[1:3]), (left, right, top, bottom), value=1.0)
    return padded.contiguous(), feathered(mask, 0, feather)
