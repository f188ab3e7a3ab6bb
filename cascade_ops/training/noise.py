"""The noise that latents are trained with: plain, with an offset, or with coarser noise added."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .draws import Draws


def offset_noise(shape: Sequence[int], draws: Draws, offset: float) -> Tensor:
    """Unit noise ``[B, C, H, W]`` plus one value per channel, of deviation `offset`.

    It lets a model change the mean brightness of a picture (Guttenberg, "Diffusion with offset noise", 2023). The
    reference trains its inpainting and super-resolution ControlNets with 0.1.
    """
    noise = draws.normal(*shape)
    return noise + offset * draws.normal(shape[0], 1, 1) if offset else noise


def pyramid_noise(
    shape: Sequence[int], draws: Draws, levels: int = 10, decay: float = 0.75, size_range: tuple[int, int] = (1, 16)
) -> Tensor:
    """Unit noise ``[B, C, H, W]`` with coarser noise added to it.

    Level ``i`` is drawn at a 2^i-th of the size, enlarged to blocks and weighted ``decay ** i``; only levels with a
    side in `size_range` are used. With white noise alone a model can read a picture's mean colour out of the noised
    latent almost up to pure noise, and then trusts it when sampling, where it is not there: a colour cast. The
    reference trains Stage B with these values (``gdf`` in Stability-AI/StableCascade).

    shape: ``(C, H, W)``.
    """
    channels, height, width = shape
    noise, variance = draws.normal(*shape), 1.0
    for level in range(1, levels):
        rows, columns = height >> level, width >> level
        if rows < 1 or columns < 1:
            break
        if any(size_range[0] <= side <= size_range[1] for side in (rows, columns)):
            coarse = draws.normal(channels, rows, columns)
            noise = noise + decay**level * F.interpolate(coarse, size=(height, width), mode="nearest")
            variance += decay ** (2 * level)
    return noise / variance**0.5
