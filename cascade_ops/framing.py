"""Which part of a picture becomes a latent, and how large it is made for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from .masks import picture_mask, resized_mask
from .sizes import RELEASE_CELLS, STAGE_A_COMPRESSION, STAGE_B_PATCH

Fit = Literal["crop", "stretch"]
Resize = Literal["smooth", "nearest"]
FITS: tuple[Fit, ...] = get_args(Fit)
RESIZES: tuple[Resize, ...] = get_args(Resize)

# Cells of Stage C on the longer side of the largest pictures that the family was trained on.
_MOST_CELLS, _MOST_CELLS_TINY = RELEASE_CELLS[1], 6
_PUBLISHED_COMPRESSION = 128 / 3


@dataclass(frozen=True)
class Frame:
    """The part of a picture that is taken, from `left` and `top` on, and the size in pixels that it is given."""

    left: int
    top: int
    columns: int
    rows: int
    width: int
    height: int

    @property
    def cuts(self) -> bool:
        """Whether the picture's shape was not that of the frame, so that sides of it fall away."""
        return self.left > 0 or self.top > 0

    def picture(self, pictures: Tensor, size: tuple[int, int] | None = None, resize: Resize = "smooth") -> Tensor:
        """The part of ``[n, c, H, W]`` pictures, resized to `size` ``(height, width)``; None is the frame's own."""
        part = pictures[..., self.top : self.top + self.rows, self.left : self.left + self.columns]
        size = size or (self.height, self.width)
        if part.shape[-2:] == size:
            return part
        if resize == "nearest":
            return F.interpolate(part, size=size, mode="nearest")
        return F.interpolate(part, size=size, mode="bilinear", antialias=True).clamp(0, 1)

    def image(self, image: Tensor) -> Tensor:
        """The part of an `IMAGE` ``[n, H, W, c]`` in the frame's size."""
        return self.picture(image[..., :3].float().permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()

    def mask(self, mask: Tensor, count: int, height: int, width: int) -> Tensor:
        """The part of a `MASK` of `count` pictures of ``height x width``: ``[1 or count, 1, h, w]``, the frame's size.

        Raises ValueError for a mask that is not the pictures', see `masks.picture_mask`.
        """
        masks = picture_mask(mask, count, height, width)
        part = masks[..., self.top : self.top + self.rows, self.left : self.left + self.columns]
        return resized_mask(part, self.height, self.width)


def frame_of(
    picture_height: int, picture_width: int, width: int = 0, height: int = 0, fit: Fit = "crop", longest: int = 0
) -> Frame:
    """The frame for a picture that is to be ``width x height`` pixels.

    width, height: 0 follows from the other and the picture's shape; both 0 are the picture's own size, made smaller if
    its longer side has more than `longest` pixels (0: any). fit: for a picture of another shape, ``crop`` takes its
    middle, ``stretch`` all of it.

    Raises:
        ValueError: a negative side, or an unknown way to fit.
    """
    if fit not in FITS:
        raise ValueError(f"There is no way to fit called '{fit}': choose one of {', '.join(FITS)}.")
    if width < 0 or height < 0:
        raise ValueError(f"The size asked for is {width} x {height}, expected 0 or more: 0 is the picture's own.")
    if not width and not height:
        width, height = _own_size(picture_height, picture_width, longest)
    width = width or max(1, round(height * picture_width / picture_height))
    height = height or max(1, round(width * picture_height / picture_width))
    if fit == "stretch":
        return Frame(0, 0, picture_width, picture_height, width, height)
    columns = min(picture_width, max(1, round(picture_height * width / height)))
    rows = min(picture_height, max(1, round(picture_width * height / width)))
    return Frame((picture_width - columns) // 2, (picture_height - rows) // 2, columns, rows, width, height)


def longest_side(family: str, compression: float = 0.0) -> int:
    """Pixels that the longer side of a picture has at most if nobody asks for a size: what Stage C was trained on.

    2560 at the published compression, 256 with the tiny family, which knows one size; see `sizes` for compression.
    """
    cells = _MOST_CELLS_TINY if family == "tiny" else _MOST_CELLS
    return round(cells * (compression or _PUBLISHED_COMPRESSION))


def _own_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """``(width, height)``, made smaller to multiples of what Stage B takes without padding."""
    if not longest or max(height, width) <= longest:
        return width, height
    cell = STAGE_A_COMPRESSION * STAGE_B_PATCH
    scale = longest / max(height, width)
    return max(cell, round(width * scale / cell) * cell), max(cell, round(height * scale / cell) * cell)
