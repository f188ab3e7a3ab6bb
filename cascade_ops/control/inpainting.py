"""Inpainting and outpainting: the picture with a hole in it, and random holes to learn from.

The control of the published ControlNet has four channels: the picture with masked pixels white, and the mask.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

if TYPE_CHECKING:
    from ..training.draws import Draws

# A random mask covers between these shares of a picture.
SMALLEST_SHARE, LARGEST_SHARE = 0.1, 0.8
_TRIES = 8
_POINTS = 6
_NUMBERS = 4 + 3 * 2 * _POINTS


def inpainting_control(image: Tensor, mask: Tensor) -> Tensor:
    """The control of an inpainting ControlNet: ``[B, 4, H, W]`` float32, 0..1.

    Args:
        image: ``[B, 3, H, W]`` in 0..1.
        mask: ``[B or 1, 1, H, W]`` or ``[B or 1, H, W]``; what is at least a half is masked: to be made anew. The
            ControlNet knows no half masked pixels.

    Raises:
        ValueError: the mask's batch or size is not the picture's.
    """
    if mask.ndim == 3:
        mask = mask[:, None]
    batch, _, height, width = image.shape
    if mask.ndim != 4 or mask.shape[1:] != (1, height, width) or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"The mask has the shape {list(mask.shape)} for {batch} pictures of {width} x {height}, expected one mask "
            "for all or one per picture, of the picture's size: resize it."
        )
    masked = (mask >= 0.5).to(image.device).expand(batch, -1, -1, -1)
    holed = image.float().masked_fill(masked, 1.0)
    return torch.cat([holed, masked.float()], dim=1)


def random_masks(draws: Draws, height: int, width: int) -> Tensor:
    """A mask per sample to learn inpainting and outpainting from, float32 ``[B, 1, height, width]`` of 0 and 1.

    A third each: one to three boxes, one to three brush strokes, and borders (everything outside of a box that touches
    some sides or none). Each covers 10 to 80 % of the picture.
    """
    numbers = draws.uniform(_TRIES, _NUMBERS).tolist()
    return torch.stack([_first_fitting(tries, height, width) for tries in numbers])[:, None]


def _first_fitting(tries: list[list[float]], height: int, width: int) -> Tensor:
    """The first mask of a sensible share."""
    for numbers in tries:
        mask = _mask(numbers, height, width)
        if SMALLEST_SHARE <= mask.mean().item() <= LARGEST_SHARE:
            return mask
    mask = torch.zeros(height, width)  # the middle, which always fits
    mask[height // 4 : math.ceil(3 * height / 4), width // 4 : math.ceil(3 * width / 4)] = 1
    return mask


def _mask(numbers: list[float], height: int, width: int) -> Tensor:
    """A mask ``[height, width]`` from numbers in 0..1: which kind, how many parts, then the parts."""
    kind, count, parts = int(numbers[0] * 3), 1 + int(numbers[1] * 3), numbers[4:]
    if kind == 2:
        return _border(parts, height, width)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    for index in range(count):
        part = parts[index * 2 * _POINTS : (index + 1) * 2 * _POINTS]
        if kind == 0:
            _box(pen, part, height, width)
        else:
            _stroke(pen, part, 0.06 + 0.14 * numbers[2], height, width)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def _box(pen: ImageDraw.ImageDraw, part: list[float], height: int, width: int) -> None:
    tall, wide = (0.2 + 0.5 * value for value in part[:2])
    top, left = (1 - tall) * part[2] * height, (1 - wide) * part[3] * width
    # Pillow counts the last pixel in; a box has at least one.
    right, bottom = left + max(0.0, wide * width - 1), top + max(0.0, tall * height - 1)
    pen.rectangle((left, top, right, bottom), fill=255)


def _stroke(pen: ImageDraw.ImageDraw, part: list[float], thickness: float, height: int, width: int) -> None:
    """A line through random points with round joints, `thickness` in shares of the shorter side."""
    points = [(x * width, y * height) for x, y in zip(part[::2], part[1::2], strict=True)]
    thick = max(1, round(thickness * min(height, width)))
    pen.line(points, fill=255, width=thick)
    for x, y in points:
        pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)


def _border(part: list[float], height: int, width: int) -> Tensor:
    """All but a box; each side is moved in from the picture's edge in two of three cases."""
    inset = [0.0 if moved < 1 / 3 else 0.1 + 0.35 * size for moved, size in zip(part[:4], part[4:8], strict=True)]
    mask = torch.ones(height, width)
    top, bottom = round(inset[0] * height), height - round(inset[1] * height)
    left, right = round(inset[2] * width), width - round(inset[3] * width)
    mask[top:bottom, left:right] = 0
    return mask
