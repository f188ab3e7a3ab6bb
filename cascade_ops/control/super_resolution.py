"""Super-resolution: the Stage C latent of a smaller picture, enlarged, as the control for a picture twice its size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import LatentEncoder
from ..models.effnet import normalize_imagenet
from ..sizes import ENCODER_COMPRESSION

SCALE = 2


@torch.no_grad()
def super_resolution_control(encoder: LatentEncoder, image: Tensor) -> Tensor:
    """The control for making ``[B, 3, H, W]`` pictures in 0..1 larger: ``[B, 16, 2 H / 32, 2 W / 32]`` float32.

    Their latent, each cell repeated in both directions. The picture made has twice the size of the one given, or 8/3
    of it, where one cell of the control lies on one of Stage C (the reference does the first: 1024 to 2048).
    `encoder` is in evaluation mode, on the picture's device.
    """
    dtype = next(encoder.parameters()).dtype
    latent = encoder(normalize_imagenet(image.float()).to(dtype)).float()
    return F.interpolate(latent, scale_factor=SCALE, mode="nearest")


def smaller_picture(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` pictures at half their size, nearest pixels, as the reference trains on.

    Sides are rounded up to multiples of 32, so that the latent's cells cover the picture exactly.
    """
    cell = SCALE * ENCODER_COMPRESSION
    size = [math.ceil(side / cell) * ENCODER_COMPRESSION for side in image.shape[-2:]]
    return F.interpolate(image, size=size, mode="nearest")
