"""The size at which a control picture is shown to a ControlNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..sizes import encoder_picture_size


def control_picture(image: Tensor, latent_height: int, latent_width: int) -> Tensor:
    """``[B, C, H, W]`` pictures in 0..1 resized to ``[B, C, 32 latent_height, 32 latent_width]``.

    At this size a control has one feature per cell of Stage C's latent; it is three quarters of the finished picture's
    size, and what the published ControlNets were trained on (768 for 1024). Bilinear, smoothed where it shrinks.
    """
    size = encoder_picture_size(latent_height, latent_width)
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image.float(), size=size, mode="bilinear", antialias=True).clamp(0, 1)
