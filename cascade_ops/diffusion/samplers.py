"""One step from a noise level to the next, in the VP log-SNR parametrisation.

Every sampler is a function of a `Step` and of `draw`, which gives fresh unit noise shaped like the latent and is only
called by samplers that add noise; it returns the latent at the next level. ``sigma = b / a`` below is the noise level
of k-diffusion and ``lambda = log_snr / 2`` that of the DPM-Solver papers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .schedules import signal_and_noise


class Previous(NamedTuple):
    """What a multistep sampler remembers of the step before."""

    x0: Tensor
    log_snr: Tensor


class Step(NamedTuple):
    """What a sampler works from; latents are float32 ``[B, C, H, W]``, levels 0-dimensional float32.

    x: the latent at `log_snr`, which the model reads as ``a * x0 + b * epsilon``. previous: None in the first step.
    """

    x: Tensor
    x0: Tensor
    epsilon: Tensor
    log_snr: Tensor
    next_log_snr: Tensor
    previous: Previous | None = None


Draw = Callable[[], Tensor]
Sampler = Callable[[Step, Draw], Tensor]


def ddim(step: Step, draw: Draw) -> Tensor:
    """Deterministic step to the same `x0` with the same noise (Song et al. 2020, arXiv 2010.02502, eta 0)."""
    a, b = signal_and_noise(step.next_log_snr)
    return a * step.x0 + b * step.epsilon


def ddpm(step: Step, draw: Draw) -> Tensor:
    """Ancestral step, DDIM with eta 1 (Ho et al. 2020, arXiv 2006.11239); the release's sampler for both stages.

    The fresh part of the noise has the variance of the posterior q(x_next | x, x0).
    """
    a, b = signal_and_noise(step.log_snr)
    next_a, next_b = signal_and_noise(step.next_log_snr)
    fresh = next_b / b * (1 - (a / next_a) ** 2).clamp(min=0).sqrt()
    kept = (next_b**2 - fresh**2).clamp(min=0).sqrt()
    return next_a * step.x0 + kept * step.epsilon + fresh * draw()


def lcm(step: Step, draw: Draw) -> Tensor:
    """Keep the predicted clean latent and noise it afresh (Song et al. 2023, arXiv 2303.01469, algorithm 1;
    Luo et al. 2023, arXiv 2310.04378). Meant for consistency-distilled weights; others come out too smooth."""
    a, b = signal_and_noise(step.next_log_snr)
    return a * step.x0 + b * draw()


def euler(step: Step, draw: Draw) -> Tensor:
    """Euler's method for the probability-flow ODE in sigma (Karras et al. 2022, arXiv 2206.00364, algorithm 1
    without churn). In exact arithmetic this is `ddim`; it is here under the name people look for."""
    a, b = signal_and_noise(step.log_snr)
    next_a, next_b = signal_and_noise(step.next_log_snr)
    # In y = x / a the ODE is dy / dsigma = epsilon.
    return next_a * (step.x / a + step.epsilon * (next_b / next_a - b / a))


def euler_ancestral(step: Step, draw: Draw) -> Tensor:
    """Euler step to below the next sigma, then noise up to it (``euler_ancestral`` of crowsonkb/k-diffusion, eta 1,
    after the ancestral sampling of Song et al. 2020, arXiv 2011.13456). In exact arithmetic this is `ddpm`."""
    a, b = signal_and_noise(step.log_snr)
    next_a, next_b = signal_and_noise(step.next_log_snr)
    sigma, next_sigma = b / a, next_b / next_a
    up = next_sigma * (1 - (next_sigma / sigma) ** 2).clamp(min=0).sqrt()
    down = next_sigma**2 / sigma  # so that down**2 + up**2 = next_sigma**2
    return next_a * (step.x / a + step.epsilon * (down - sigma) + up * draw())


def _extrapolated(step: Step) -> Tensor:
    """The clean latent in the middle of the step, extrapolated from this and the previous prediction.

    Never further than after a step of equal length: the cosine schedule's last step is several times as long in
    lambda as the one before, and the full extrapolation would be worse there than none.
    """
    if step.previous is None or not step.previous.log_snr < step.log_snr:
        return step.x0  # the first step, or a clamped end of the schedule, where two levels are equal
    ratio = (step.next_log_snr - step.log_snr) / (step.log_snr - step.previous.log_snr)
    return step.x0 + 0.5 * ratio.clamp(max=1) * (step.x0 - step.previous.x0)


def dpmpp_2m(step: Step, draw: Draw) -> Tensor:
    """DPM-Solver++(2M): deterministic, second order (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    noise_ratio = signal_and_noise(step.next_log_snr)[1] / signal_and_noise(step.log_snr)[1]
    next_a = signal_and_noise(step.next_log_snr)[0]
    forgotten = -torch.expm1(-0.5 * (step.next_log_snr - step.log_snr))
    return noise_ratio * step.x + next_a * forgotten * _extrapolated(step)


def dpmpp_2m_sde(step: Step, draw: Draw) -> Tensor:
    """SDE-DPM-Solver++(2M): the same with fresh noise in every step (Lu et al. 2022, arXiv 2211.01095, section 5)."""
    b = signal_and_noise(step.log_snr)[1]
    next_a, next_b = signal_and_noise(step.next_log_snr)
    gain = step.next_log_snr - step.log_snr  # twice the papers' h
    forgotten = -torch.expm1(-gain)
    kept = next_b / b * torch.exp(-0.5 * gain)
    return kept * step.x + next_a * forgotten * _extrapolated(step) + next_b * forgotten.sqrt() * draw()


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "lcm": lcm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
