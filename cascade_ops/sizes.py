"""Which latent sizes belong to a picture of a given pixel size.

Stage C works at 1/42.67 of the picture, Stage B at 1/4, the latent encoder at 1/32 of the picture it is shown. Large
pictures need a higher compression than 42.67, or Stage C repeats its objects: `proposed_compression`.
Source: `inference/utils.py` in Stability-AI/StableCascade, checked against its numbers.
"""

import math

STAGE_C_COMPRESSION = 42.67
STAGE_A_COMPRESSION = 4
ENCODER_COMPRESSION = 32
STAGE_B_PATCH = 2

# A Stage C latent as fine as this would hold as many cells as Stage B's.
LEAST_COMPRESSION = 4.0

# Cells on the longer side of Stage C's latent that the release was trained on; beyond, objects double.
RELEASE_CELLS = (24, 60)
# Pixels of the picture per cell that Stage B learned: the reference's training (`train/train_b.py`) encodes the Stage C
# latent from a picture resized to between all and half of its size, at the latent encoder's 32.
STAGE_B_COMPRESSIONS = (32.0, 64.0)

# 42.67 stands for 128 / 3: with it, latents of 24 are pictures of exactly 1024.
_STAGE_C_EXACT = 128 / 3


def _check(height: int, width: int, what: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"The {what} size is {width} x {height}, expected at least 1 x 1: give a width and a height.")


def stage_c_size(height: int, width: int, compression: float = 0.0) -> tuple[int, int]:
    """Stage C latent ``(h, w)`` for a picture in pixels, rounded up: 1024 x 1024 gives 24 x 24.

    compression: pixels of the picture per cell; 0 is the published 42.67.
    """
    _check(height, width, "picture")
    if compression and not LEAST_COMPRESSION <= compression < math.inf:  # refuses NaN too
        raise ValueError(
            f"The compression is {compression:g}, expected 0 (the published {STAGE_C_COMPRESSION}) or at least "
            f"{LEAST_COMPRESSION:g} pixels per cell: take the one that 'Cascade: propose size' gives."
        )
    # 2568 / 42.8 is a little more than 60 in floats.
    rows, columns = (math.ceil(side / (compression or STAGE_C_COMPRESSION) - 1e-9) for side in (height, width))
    return rows, columns


def stage_b_size(height: int, width: int) -> tuple[int, int]:
    """Stage B latent ``(h, w)`` for a picture in pixels, rounded up to even numbers, since Stage B reads 2 x 2 patches.

    1024 x 1024 gives 256 x 256. A picture whose sides are not multiples of 8 is decoded larger and has to be cropped.
    """
    _check(height, width, "picture")
    cell = STAGE_A_COMPRESSION * STAGE_B_PATCH
    return math.ceil(height / cell) * STAGE_B_PATCH, math.ceil(width / cell) * STAGE_B_PATCH


def picture_size(latent_height: int, latent_width: int) -> tuple[int, int]:
    """Pixels ``(height, width)`` to make from a Stage C latent when nothing else is asked: 24 x 24 gives 1024 x 1024.

    Rounded to the nearest multiple of 8, which Stage B takes without cropping.
    """
    _check(latent_height, latent_width, "Stage C latent")
    cell = STAGE_A_COMPRESSION * STAGE_B_PATCH
    return round(latent_height * _STAGE_C_EXACT / cell) * cell, round(latent_width * _STAGE_C_EXACT / cell) * cell


def encoder_picture_size(latent_height: int, latent_width: int) -> tuple[int, int]:
    """Pixels ``(height, width)`` at which the latent encoder gives a Stage C latent of this size.

    A picture for image to image is resized to this first: 24 x 24 needs 768 x 768, three quarters of 1024.
    """
    _check(latent_height, latent_width, "Stage C latent")
    return latent_height * ENCODER_COMPRESSION, latent_width * ENCODER_COMPRESSION


def known_cells(own_height: int, own_width: int) -> tuple[int, int]:
    """Least and most cells on the longer side that a Stage C knows whose own picture has this size in pixels.

    24 to 60 for the release, whose own is 1024 x 1024; any other is taken to know its own size only, as the tiny one
    does.
    """
    own = max(stage_c_size(own_height, own_width))
    return RELEASE_CELLS if own == RELEASE_CELLS[0] else (own, own)


def proposed_compression(height: int, width: int, cells: tuple[int, int] = RELEASE_CELLS) -> float:
    """The compression for a picture in pixels that keeps the longer side of Stage C between `cells`.

    42.67 where that does. Higher for larger pictures, as high as it takes. Lower for smaller ones, down to the 32 that
    Stage B learned. Two decimals, rounded up: 2560 x 1440 gives 42.67 and 4096 x 4096 gives 68.27.
    """
    longest = max(height, width)
    least, most = cells
    own = max(stage_c_size(height, width))
    if least <= own <= most:
        return STAGE_C_COMPRESSION
    hundredths = -(-longest * 100 // (most if own > most else least))
    return max(STAGE_B_COMPRESSIONS[0], hundredths / 100) if own < least else hundredths / 100


def proposed_size(ratio: float, area: float, multiple: int = STAGE_A_COMPRESSION * STAGE_B_PATCH) -> tuple[int, int]:
    """Pixels ``(height, width)`` of a picture with about so many pixels, `ratio` times as wide as high.

    Both are the nearest multiples of `multiple`, at least one of it.
    """
    if not (0 < ratio < math.inf and 0 < area < math.inf) or multiple < 1:
        raise ValueError(
            f"A picture of {area:g} pixels, {ratio:g} times as wide as high, in steps of {multiple} was asked for; "
            "expected numbers above 0: give a size and an aspect."
        )
    sides = math.sqrt(area / ratio), math.sqrt(area * ratio)
    height, width = (max(1, round(side / multiple)) * multiple for side in sides)
    return height, width
