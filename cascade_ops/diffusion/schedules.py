"""Noise levels over time, in log-SNR.

A latent at noise level ``log_snr`` is ``a * x0 + b * epsilon`` with ``a**2 / b**2 = exp(log_snr)`` and
``a**2 + b**2 = 1`` (variance preserving, "VP"). Time runs from 1 (noise) to 0 (picture). A schedule is a function
from time to log-SNR. Stable Cascade was trained with `cosine`; the model is not told the time but `noise_cond`, which
is computed from the log-SNR, so any schedule can be used for sampling.

Source of the schedules, the shift and the noise conditioning: `gdf/` in Stability-AI/StableCascade, checked against
its numbers. All functions take and return float32 tensors of any shape.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]

COSINE_OFFSET = 0.008


def _logit(variance: Tensor) -> Tensor:
    return (variance / (1 - variance)).log()


def cosine(t: Tensor, clamp: tuple[float, float] = (1e-4, 0.9999)) -> Tensor:
    """Cosine schedule of Nichol and Dhariwal 2021 (arXiv 2102.09672), ``a**2 = cos(...)**2``.

    ``a**2`` is held inside `clamp`: without it, log-SNR would be infinite at both ends. The clamp flattens only the
    first and last 0.6 % of the time and puts the ends at -9.21 and 9.21.
    """
    quarter = math.pi / 2
    norm = math.cos(COSINE_OFFSET / (1 + COSINE_OFFSET) * quarter) ** 2
    variance = torch.cos((COSINE_OFFSET + t) / (1 + COSINE_OFFSET) * quarter).clamp(0, 1) ** 2 / norm
    return _logit(variance.clamp(*clamp))


def cosine2(t: Tensor, log_snr_range: tuple[float, float] = (-15.0, 15.0)) -> Tensor:
    """Cosine schedule cut at a log-SNR range (Salimans and Ho 2022, arXiv 2202.00512; Hoogeboom et al. 2023)."""
    low, high = (math.atan(math.exp(-0.5 * bound)) for bound in (log_snr_range[1], log_snr_range[0]))
    return -2 * torch.tan(low + t * (high - low)).log()


def sqrt(t: Tensor, offset: float = 1e-4, clamp: tuple[float, float] = (1e-4, 0.9999)) -> Tensor:
    """Square-root schedule of Diffusion-LM (Li et al. 2022, arXiv 2205.14217)."""
    return _logit((1 - (t + offset).sqrt()).clamp(*clamp))


def linear(t: Tensor, log_snr_range: tuple[float, float] = (-10.0, 10.0)) -> Tensor:
    """Log-SNR linear in time (Kingma et al. 2021, arXiv 2107.00630)."""
    return log_snr_range[1] + t * (log_snr_range[0] - log_snr_range[1])


def rectified_flow(t: Tensor, log_snr_range: tuple[float, float] = (-15.0, 15.0)) -> Tensor:
    """Levels of the straight path ``(1 - t) * x0 + t * epsilon`` (Liu et al. 2022, arXiv 2209.03003)."""
    return (2 * ((1 - t).log() - t.log())).clamp(*log_snr_range)


def edm_sample(t: Tensor, sigma_range: tuple[float, float] = (0.002, 80.0), rho: float = 7.0) -> Tensor:
    """Sampling levels of Karras et al. 2022 (arXiv 2206.00364, eq. 5), ``sigma = b / a``."""
    low, high = (sigma ** (1 / rho) for sigma in sigma_range)
    return -2 * rho * (high + (1 - t) * (low - high)).log()


def stable_diffusion(t: Tensor, beta_range: tuple[float, float] = (0.00085, 0.012), steps: int = 1000) -> Tensor:
    """Stable Diffusion's scaled-linear beta table (Rombach et al. 2022), linearly interpolated in time."""
    low, high = (beta**0.5 for beta in beta_range)
    betas = torch.linspace(low, high, steps + 1, dtype=torch.float64) ** 2
    table = (1 - betas).cumprod(0).float().to(t.device)
    position = t * steps
    left = position.floor().clamp(0, steps - 1).long()
    return _logit(torch.lerp(table[left], table[left + 1], position - left))


SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "cosine2": cosine2,
    "edm_sample": edm_sample,
    "linear": linear,
    "rectified_flow": rectified_flow,
    "sqrt": sqrt,
    "stable_diffusion": stable_diffusion,
}


def log_snr_at(t: Tensor | float, schedule: str = "cosine", shift: float = 1.0) -> Tensor:
    """Log-SNR at time `t` (0..1, values outside are clamped), moved towards noise by `shift`.

    `shift` divides the signal-to-noise ratio by ``shift**2``, which is how simple diffusion (Hoogeboom et al. 2023,
    arXiv 2301.11093) adapts a schedule to larger latents; the release samples Stage C with 2 and Stage B with 1.
    A shifted value stays within the ends of the unshifted schedule, so a model never sees a level outside its training.

    Raises ValueError for an unknown schedule name or a shift that is not above 0.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"There is no schedule '{schedule}': choose one of {', '.join(SCHEDULES)}.")
    if not shift > 0:
        raise ValueError(f"The shift is {shift}, expected a number above 0: use 1 for no shift, 2 for Stage C.")
    curve = SCHEDULES[schedule]
    log_snr = curve(torch.as_tensor(t, dtype=torch.float32).clamp(0, 1))
    if shift != 1:
        low, high = curve(torch.tensor([1.0, 0.0], device=log_snr.device)).unbind()
        log_snr = torch.minimum(torch.maximum(log_snr - 2 * math.log(shift), low), high)
    return log_snr


def step_times(steps: int, t_start: float = 1.0, t_end: float = 0.0) -> Tensor:
    """The ``steps + 1`` times of a run, evenly spaced from `t_start` down to `t_end`: float32 ``[steps + 1]``.

    Raises ValueError unless ``steps >= 1`` and ``0 <= t_end < t_start <= 1``.
    """
    if steps < 1:
        raise ValueError(f"The number of steps is {steps}, expected at least 1: 20 suits Stage C and 10 Stage B.")
    if not 0 <= t_end < t_start <= 1:
        raise ValueError(
            f"The schedule runs from {t_start} to {t_end}, expected 1 >= start > end >= 0: 1 is noise, 0 the picture."
        )
    return torch.linspace(t_start, t_end, steps + 1)


def training_times(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random times for training, uniform over (0.001, 1]: float32 ``[count]`` on the CPU.

    The lower bound is the reference's: below it the cosine schedule is flat.
    """
    return (1.001 - torch.rand(count, generator=generator)).clamp(0.001, 1.0)


def signal_and_noise(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """VP scaler: the factors ``(a, b)`` of the clean latent and of the noise at a level, shaped as `log_snr`."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def add_noise(x0: Tensor, noise: Tensor, log_snr: Tensor) -> Tensor:
    """Diffuse clean latents ``[B, ...]`` to a level: one value of `log_snr` for all or one per item ``[B]``."""
    a, b = (level.view(-1, *[1] * (x0.ndim - 1)) if level.ndim else level for level in signal_and_noise(log_snr))
    return a * x0 + b * noise


def noise_cond(log_snr: Tensor) -> Tensor:
    """What the model is told about the noise level: the cosine schedule's time at this log-SNR, 0.0023..0.9936.

    Float32 on purpose: the model multiplies it by 10,000, and in bfloat16 neighbouring steps would become one.
    """
    quarter = math.pi / 2
    norm = math.cos(COSINE_OFFSET / (1 + COSINE_OFFSET) * quarter) ** 2
    angle = (torch.sigmoid(log_snr.float()) * norm).sqrt().acos()
    return angle / quarter * (1 + COSINE_OFFSET) - COSINE_OFFSET
