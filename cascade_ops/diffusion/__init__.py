"""Diffusion in log-SNR: schedules, targets, loss weights, samplers, guidance and the sampling loop."""

from .guidance import Guidance
from .loss_weights import LOSS_WEIGHTS, AdaptiveLossWeight, loss_weight
from .masking import fit_mask
from .noise import draw_noise, image_generators
from .samplers import SAMPLERS, Sampler, Step
from .sampling import Denoiser, Sampled, StepInfo, noised_start, sample
from .schedules import (
    SCHEDULES,
    add_noise,
    log_snr_at,
    noise_cond,
    signal_and_noise,
    step_times,
    training_times,
)
from .targets import TARGETS, Target

__all__ = [
    "LOSS_WEIGHTS",
    "SAMPLERS",
    "SCHEDULES",
    "TARGETS",
    "AdaptiveLossWeight",
    "Denoiser",
    "Guidance",
    "Sampled",
    "Sampler",
    "Step",
    "StepInfo",
    "Target",
    "add_noise",
    "draw_noise",
    "fit_mask",
    "image_generators",
    "log_snr_at",
    "loss_weight",
    "noise_cond",
    "noised_start",
    "sample",
    "signal_and_noise",
    "step_times",
    "training_times",
]
