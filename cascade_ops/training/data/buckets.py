"""Picture shapes that are trained on.

All pictures of a batch have one shape, and a shape has to fit every stage. A latent of Stage C is a whole number of
cells, each 32 pixels of the picture at 3/4 of its size, so 128 / 3 of the picture itself; Stage B wants sides that are
multiples of 8. So a bucket is a number of cells, and its picture is the largest one with sides in multiples of 8 that
these cells cover: `sizes.stage_c_size` of the picture gives the cells back, which makes training and sampling agree.
24 x 24 cells are 1024 x 1024 pixels (768 for the encoder), 6 x 6 are 256 x 256 (192).

Source of the idea: the reference trains on lists of aspect ratios with about the area of a square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...sizes import STAGE_A_COMPRESSION, STAGE_B_PATCH, encoder_picture_size

_MULTIPLE = STAGE_A_COMPRESSION * STAGE_B_PATCH
_SMALLEST, _LARGEST_RATIO = 32, 10.0


class Bucket(NamedTuple):
    """One shape: pixels of the picture, and cells of its Stage C latent."""

    width: int
    height: int
    latent_width: int
    latent_height: int

    @property
    def encoder_size(self) -> tuple[int, int]:
        """Pixels ``(height, width)`` at which the latent encoder sees the picture."""
        return encoder_picture_size(self.latent_height, self.latent_width)

    @property
    def shape(self) -> str:
        """``1024x768``, width first."""
        return f"{self.width}x{self.height}"


def make_buckets(resolution: int, ratios: Sequence[float]) -> tuple[Bucket, ...]:
    """The shapes with about the area of a square of `resolution` pixels a side, from the widest to the tallest.

    ratios: width / height. Small resolutions have few shapes: ratios that come to the same one share it.

    Raises:
        ValueError: a resolution below 32, no ratio, or one beyond 1:10.
    """
    if resolution < _SMALLEST:
        raise ValueError(
            f"The resolution is {resolution}, expected at least {_SMALLEST} pixels: set data.resolution to what the "
            "model makes, such as 1024."
        )
    if not ratios:
        raise ValueError("There are no buckets, expected at least one aspect ratio: set data.buckets, such as [1.0].")
    for ratio in ratios:
        if not 1 / _LARGEST_RATIO <= ratio <= _LARGEST_RATIO:
            raise ValueError(
                f"The bucket {ratio:g} is no aspect ratio (width / height) from {1 / _LARGEST_RATIO:g} to "
                f"{_LARGEST_RATIO:g}: correct data.buckets."
            )
    side = resolution * 3 / 128  # cells of the square
    cells = {(_whole(side * math.sqrt(ratio)), _whole(side / math.sqrt(ratio))) for ratio in ratios}
    buckets = [Bucket(_pixels(w), _pixels(h), w, h) for w, h in cells]
    return tuple(sorted(buckets, key=lambda bucket: (-bucket.width / bucket.height, bucket.width)))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> int:
    """Index of the bucket whose aspect ratio is nearest to a picture's, by the logarithm of the ratio."""
    wanted = math.log(width / height)
    return min(range(len(buckets)), key=lambda i: (abs(math.log(buckets[i].width / buckets[i].height) - wanted), i))


def _whole(cells: float) -> int:
    return max(1, math.floor(cells + 0.5))


def _pixels(cells: int) -> int:
    return cells * 128 // 3 // _MULTIPLE * _MULTIPLE
