"""The diffusion loss of Stages B and C, and the noise that Stage B learns from."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import AdaptiveLossWeight, add_noise, log_snr_at, noise_cond, training_times

# Given noised latents [B, C, H, W] and noise conditions [B], the prediction of the noise.
Predictor = Callable[[Tensor, Tensor], Tensor]


def pyramid_noise(
    shape: Sequence[int],
    generator: torch.Generator,
    levels: int = 10,
    decay: float = 0.75,
    size_range: tuple[int, int] = (1, 16),
) -> Tensor:
    """Unit noise with coarser noise added to it, ``[B, C, H, W]`` float32.

    Level ``i`` is drawn at a 2^i-th of the size, enlarged to blocks and weighted ``decay ** i``; only levels whose
    sides lie in ``size_range`` are used. With white noise alone a model can read an image's mean colour out of the
    noised latent almost up to pure noise, and then trusts it when sampling, where it is not there: a colour cast.
    The reference trains Stage B with these values (``gdf`` in Stability-AI/StableCascade).
    """
    batch, channels, height, width = shape
    noise = torch.randn(tuple(shape), generator=generator)
    variance = 1.0
    for level in range(1, levels):
        rows, columns = height >> level, width >> level
        if rows < 1 or columns < 1:
            break
        if any(size_range[0] <= side <= size_range[1] for side in (rows, columns)):
            coarse = torch.randn(batch, channels, rows, columns, generator=generator)
            noise = noise + decay**level * F.interpolate(coarse, size=(height, width), mode="nearest")
            variance += decay ** (2 * level)
    return noise / variance**0.5


def diffusion_loss(
    predict: Predictor,
    latent: Tensor,
    noise: Tensor,
    generator: torch.Generator,
    weight: AdaptiveLossWeight,
    shift: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """Weighted squared error of the predicted noise at random noise levels.

    Args:
        latent: clean latents ``[B, C, H, W]``.
        noise: unit noise of that shape.
        generator: CPU generator of the noise levels, which are drawn uniformly in time.
        weight: weights the levels, and learns from the unweighted losses.
        shift: of the schedule that the levels are drawn from.

    Returns:
        The loss, and the unweighted mean for the log.
    """
    log_snr = log_snr_at(training_times(len(latent), generator), shift=shift)
    noised = add_noise(latent, noise, log_snr.to(latent.device))
    error = (predict(noised, noise_cond(log_snr).to(latent.device)).float() - noise).square().mean(dim=(1, 2, 3))
    loss = (error * weight(log_snr).to(error.device)).mean()
    weight.update(log_snr, error)
    return loss, {"mse": error.mean().item()}
