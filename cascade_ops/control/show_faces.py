"""Faces made visible: their boxes on pictures, and the map that an identity ControlNet reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .identity import Faces


def with_boxes(pictures: Tensor, faces: Sequence[Faces]) -> Tensor:
    """``pictures [B, H, W, 3]``, 0..1, with a frame around each face, in the colour of its embedding on black.

    faces: one entry per picture, in pictures of any size; boxes are taken relative to it.
    """
    shown = pictures.clone()
    height, width = shown.shape[1:3]
    thick = max(1, round(min(height, width) / 128))
    for picture, found in zip(shown, faces, strict=True):
        boxes = found.boxes.float() * torch.tensor([width / found.width, height / found.height] * 2)
        # The first face is drawn last, so that it is seen where two meet.
        for box, colour in zip(reversed(boxes.tolist()), reversed(colours(found.embeddings)), strict=True):
            _frame(picture, box, 2 * thick, torch.zeros(3))
            _frame(picture, box, thick, colour)
    return shown


def map_picture(maps: Tensor, cell: int = 8) -> Tensor:
    """An identity control ``[B, C, h, w]`` as pictures ``[B, h * cell, w * cell, 3]``, 0..1.

    Each cell has the colour of its embedding: one person's cells look alike in every picture. Free cells are black.
    """
    batch, channels, rows, columns = maps.shape
    vectors = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    painted = colours(vectors) * vectors.any(dim=1, keepdim=True)
    small = painted.reshape(batch, rows, columns, 3)
    return small.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)


def colours(embeddings: Tensor) -> Tensor:
    """A bright colour ``[N, 3]``, 0..1, for each of ``embeddings [N, C]``, by its direction: near ones look alike."""
    unit = F.normalize(embeddings.float(), dim=1)
    # Any fixed directions do; these are the same on every machine.
    angles = torch.arange(unit.shape[1], dtype=torch.float32)[:, None] * torch.tensor([1.0, 1.7, 2.9]) + 0.5
    mixed = torch.sigmoid(2.5 * unit @ torch.cos(angles))
    return mixed / mixed.amax(dim=1, keepdim=True).clamp(min=1e-6)


def _frame(picture: Tensor, box: Sequence[float], thick: int, colour: Tensor) -> None:
    """Paint the inner border of a box, `thick` pixels wide; what lies outside of the picture is left out."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (round(side) for side in box)
    left, top = max(0, min(left, width - 1)), max(0, min(top, height - 1))
    right, bottom = max(left + 1, min(right, width)), max(top + 1, min(bottom, height))
    region = picture[top:bottom, left:right]
    for side in (region[:thick], region[-thick:], region[:, :thick], region[:, -thick:]):
        side[:] = colour
