"""Edges of a picture: the Canny detector with the thresholds and the sizes of the published canny ControlNet.

Canny, "A Computational Approach to Edge Detection" (1986), with the choices of the detector that the reference calls
(OpenCV's, on 8-bit colour): 3x3 Sobel gradients with repeated borders, each pixel's strongest channel, the gradient's
length as the sum of both sides, four directions, edges connected over eight neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOW, HIGH = 100, 200
REFERENCE_SIDE = 224
_TAN_22_5 = 0.41421356237309503


def canny(image: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Edges of ``[B, C, H, W]`` pictures in 0..1 as ``[B, 1, H, W]`` float32 of 0 and 1.

    Args:
        image: on any device; rounded down to 256 levels first.
        low, high: gradients in units of these levels; a pixel above `low` is an edge where it touches, over others of
            its kind, one above `high`.

    Raises:
        ValueError: not four dimensions, or `low` is above `high`.
    """
    if image.ndim != 4 or low > high:
        raise ValueError(
            f"Canny got pictures of shape {list(image.shape)} and the thresholds {low:g} and {high:g}, expected "
            "[batch, channels, height, width] and a low threshold that is not above the high one: correct them."
        )
    # A processor is fastest with what fits its cache, a GPU with everything at once.
    parts = image.detach().split(1 if image.device.type == "cpu" else max(1, len(image)))
    return torch.cat([_edges(part, low, high) for part in parts])


def _edges(image: Tensor, low: float, high: float) -> Tensor:
    # A small allowance, so that k / 255 in float32 is level k and not the one below.
    levels = (image.float().clamp(0, 1) * 255 + 1e-3).floor()
    # Gradients of 8-bit levels are below 2048, and small integers are added fastest.
    across, down = _gradient(F.pad(levels, (1, 1, 1, 1), mode="replicate").short())
    # A frame of zeros stands for the neighbours that a picture's border does not have.
    length = F.pad((across.abs() + down.abs()).amax(dim=1), (1, 1, 1, 1))
    ridge = _ridges(across, down, length, low)
    candidates = torch.zeros_like(length, dtype=torch.bool)
    candidates.view(-1)[ridge] = True
    return _connected(ridge[length.view(-1)[ridge] > high], candidates)[:, None, 1:-1, 1:-1].float()


def canny_control(image: Tensor, low: float = LOW, high: float = HIGH, side: int | None = REFERENCE_SIDE) -> Tensor:
    """The control of a canny ControlNet for ``[B, 3, H, W]`` pictures in 0..1: ``[B, 1, H, W]`` float32, 0..1.

    Args:
        low, high: see `canny`.
        side: edges are looked for in the picture stretched to a square of this side, then stretched back, bilinear
            both ways without smoothing (except for very small pictures): the published ControlNet was trained on 224.
            None finds them at full size.
    """
    if side is None:
        return canny(image, low, high)
    square = F.interpolate(image.detach().float(), size=(side, side), mode="bilinear")
    size = image.shape[-2:]
    # Without smoothing, a line of one pixel would fall between the pixels of a picture below half the square.
    return F.interpolate(canny(square, low, high), size=size, mode="bilinear", antialias=2 * min(size) < side)


def _gradient(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients across and down ``[B, C, H, W]`` of levels with a frame of one pixel."""
    columns = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    rows = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return columns[..., 2:] - columns[..., :-2], rows[..., 2:, :] - rows[..., :-2, :]


def _ridges(across: Tensor, down: Tensor, length: Tensor, low: float) -> Tensor:
    """Where a gradient above `low` is longer than its two neighbours along its own direction.

    across, down: ``[B, C, H, W]``. length: ``[B, H + 2, W + 2]``. Returns indices into the flat `length`.
    """
    picture, row, column = (length > low).nonzero(as_tuple=True)
    # Both sides of each pixel's strongest channel.
    x, y = (side[picture, :, row - 1, column - 1].float() for side in (across, down))
    strongest = (x.abs() + y.abs()).argmax(dim=1, keepdim=True)
    x, y = x.gather(1, strongest)[:, 0], y.gather(1, strongest)[:, 0]
    width = length.shape[2]
    place = (picture * length.shape[1] + row) * width + column
    # The direction as the step to one neighbour in the flat picture; the other one is opposite.
    steps = torch.where((x < 0) == (y < 0), width + 1, width - 1)
    horizontal, vertical = y.abs() < x.abs() * _TAN_22_5, y.abs() > x.abs() * (_TAN_22_5 + 2)
    steps = torch.where(vertical, width, torch.where(horizontal, 1, steps))
    flat = length.view(-1)
    own, before, after = flat[place], flat[place - steps], flat[place + steps]
    # Of two equal neighbours in a row the first counts, so that an edge stays one pixel wide.
    kept = (own > before) & ((own > after) | ((own == after) & (horizontal | vertical)))
    return place[kept]


def _connected(seeds: Tensor, candidates: Tensor) -> Tensor:
    """The `candidates`, bool ``[B, H, W]`` with a frame of none, that touch a seed over others.

    seeds: indices into the flat candidates. Each round works on the newest pixels only.
    """
    width = candidates.shape[-1]
    offsets = torch.tensor([r * width + c for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c], device=seeds.device)
    found = torch.zeros_like(candidates)
    left, reached = candidates.view(-1), found.view(-1)
    while len(seeds):
        reached[seeds] = True
        left[seeds] = False
        around = (seeds[:, None] + offsets).flatten()
        seeds = around[left[around]].unique()
    return found
