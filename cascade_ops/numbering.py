"""Numbers on pictures, to choose by."""

from __future__ import annotations

import torch
from torch import Tensor

# Three columns and five rows for each digit, row by row.
_DIGITS = (
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001001001001",
    "111101111101111",
    "111101111001111",
)
# The shorter side of a picture for each pixel of a digit, which is a square of so many.
_SIDE = 32


def numbered(pictures: Tensor) -> Tensor:
    """New pictures ``[B, H, W, 3]`` with their places in the batch, from 0, white on black in the upper left corner.

    A digit is a sixth of the shorter side high, 10 pixels at least. What does not fit into the picture is left out.
    """
    height, width = pictures.shape[1:3]
    scale = max(2, min(height, width) // _SIDE)
    result = pictures.clone()
    for place, picture in enumerate(result):
        label = _label(place).repeat_interleave(scale, 0).repeat_interleave(scale, 1)[:height, :width]
        picture[: label.shape[0], : label.shape[1]] = label[..., None].to(picture)
    return result


def _label(number: int) -> Tensor:
    """The number in ones on zeros with a margin of one, ``[7, 4 n + 1]`` for n digits."""
    digits = str(number)
    label = torch.zeros(7, 4 * len(digits) + 1)
    for place, digit in enumerate(digits):
        rows = torch.tensor([float(bit) for bit in _DIGITS[int(digit)]]).reshape(5, 3)
        label[1:6, 4 * place + 1 : 4 * place + 4] = rows
    return label
