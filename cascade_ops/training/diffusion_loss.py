"""The diffusion loss of Stages B and C: how wrong the predicted noise is, at random noise levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion import AdaptiveLossWeight, add_noise, log_snr_at, loss_weight, noise_cond
from .draws import Draws
from .objective import StepResult
from .settings import Loss

# Given noised latents [B, C, H, W] and noise conditions [B], the prediction of the noise.
Predictor = Callable[[Tensor, Tensor], Tensor]

# The range of the cosine schedule's log-SNR, for an adaptive weight whose buckets are points on that axis.
_LOG_SNR_RANGE = (-9.3, 9.3)


class DiffusionLoss:
    """Squared error of the predicted noise, weighted by noise level.

    Noise levels are drawn uniformly in time from the cosine schedule, as in the reference. The weight is one of
    `diffusion.LOSS_WEIGHTS`, or ``adaptive``, which learns from the errors that `observe` is shown.
    """

    def __init__(self, settings: Loss):
        self.settings = settings
        self.adaptive: AdaptiveLossWeight | None = None
        if settings.weight == "adaptive" and settings.interpolate:
            # Few samples a step: the average must not remember long, and a bucket that few reach must not run away.
            bounds = (1e-7, settings.weight_limit)
            self.adaptive = AdaptiveLossWeight(
                settings.buckets, _LOG_SNR_RANGE, beta=0.97, weight_range=bounds, interpolate=True
            )
        elif settings.weight == "adaptive":
            self.adaptive = AdaptiveLossWeight(settings.buckets)

    def __call__(
        self, predict: Predictor, latent: Tensor, noise: Tensor, draws: Draws, sample_weight: Tensor | None = None
    ) -> StepResult:
        """The loss for clean latents ``[B, C, H, W]`` and unit noise of that shape; sample_weight: ``[B]``."""
        times = (1.001 - draws.uniform()).clamp(0.001, 1.0)
        log_snr = log_snr_at(times, shift=self.settings.shift)
        noise = noise.to(latent.device)
        noised = add_noise(latent, noise, log_snr.to(latent.device))
        predicted = predict(noised, noise_cond(log_snr).to(latent.device)).float()
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        weight = self.weight(log_snr).to(error.device)
        if sample_weight is not None:
            weight = weight * sample_weight.to(error.device)
        return StepResult((error * weight).mean(), error.detach(), log_snr, {"mse": error.detach().mean()})

    def weight(self, log_snr: Tensor) -> Tensor:
        """The weight ``[B]`` of noise levels ``[B]``."""
        return self.adaptive(log_snr) if self.adaptive else loss_weight(self.settings.weight, log_snr)

    def observe(self, log_snr: Tensor, error: Tensor) -> None:
        if self.adaptive:
            self.adaptive.update(log_snr, error)

    def state(self) -> dict[str, Tensor]:
        return self.adaptive.state_dict() if self.adaptive else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.adaptive:
            self.adaptive.load_state_dict({name: value.cpu() for name, value in state.items()})


def replaced(values: Tensor, chosen: Tensor, substitute: Tensor) -> Tensor:
    """`values [B, ...]` with `substitute` (``[1, ...]``) where ``chosen [B]`` is True."""
    shape = (-1, *[1] * (values.ndim - 1))
    return torch.where(chosen.to(values.device).view(shape), substitute.to(values.device, values.dtype), values)
