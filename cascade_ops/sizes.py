"""Which latent sizes belong to a picture of a given pixel size.

Stage C works at 1/42.67 of the picture, Stage B at 1/4, the latent encoder at 1/32 of the picture it is shown.
Source: `inference/utils.py` in Stability-AI/StableCascade, checked against its numbers.
"""

import math

STAGE_C_COMPRESSION = 42.67
STAGE_A_COMPRESSION = 4
ENCODER_COMPRESSION = 32
STAGE_B_PATCH = 2

# 42.67 stands for 128 / 3: with it, latents of 24 are pictures of exactly 1024.
_STAGE_C_EXACT = 128 / 3


def _check(height: int, width: int, what: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"The {what} size is {width} x {height}, expected at least 1 x 1: give a width and a height.")


def stage_c_size(height: int, width: int) -> tuple[int, int]:
    """Stage C latent ``(h, w)`` for a picture in pixels, rounded up: 1024 x 1024 gives 24 x 24."""
    _check(height, width, "picture")
    return math.ceil(height / STAGE_C_COMPRESSION), math.ceil(width / STAGE_C_COMPRESSION)


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
