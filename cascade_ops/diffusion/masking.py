"""Sampling only part of a latent: the rest is held at a given clean latent."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import add_noise


def fit_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring a mask to a latent of `shape` ``[B, C, h, w]``: float32 ``[B, 1, h, w]`` in 0..1.

    mask: ``[H, W]``, ``[n, H, W]`` or ``[n, 1, H, W]`` of any size, n being 1 or B; larger ones are averaged over
    each latent cell. Raises ValueError for another shape.
    """
    original = tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"The mask has the shape {original}, expected [H, W], [n, H, W] or [n, 1, H, W] with n = 1 or "
            f"{shape[0]}: give one mask for the batch or one per image."
        )
    mask = mask.float()
    if mask.shape[-2:] != tuple(shape[-2:]):
        mask = torch.nn.functional.interpolate(mask, size=tuple(shape[-2:]), mode="area")
    return mask.clamp(0, 1).expand(shape[0], -1, -1, -1)


@dataclass(frozen=True)
class HeldLatent:
    """A clean latent that shows through where `mask` is 0.

    Its noise is drawn once and kept for the whole run: the held part then follows one exact path from noise to the
    clean latent, as it would under a deterministic sampler.
    """

    clean: Tensor
    mask: Tensor
    noise: Tensor

    def at_level(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """`x` with the held part replaced by the clean latent noised to the level."""
        return self.blend(x, add_noise(self.clean, self.noise, log_snr))

    def restored(self, x0: Tensor) -> Tensor:
        """A predicted clean latent with the held part replaced by the clean latent itself, exactly."""
        return self.blend(x0, self.clean)

    def blend(self, sampled: Tensor, held: Tensor) -> Tensor:
        """`sampled` where the mask is 1, `held` to the last bit where it is 0, a mixture between."""
        return torch.where(self.mask > 0, self.mask * sampled + (1 - self.mask) * held, held)
