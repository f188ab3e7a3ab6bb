"""Optimisers and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from .settings import OPTIMIZERS, Optimizer


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """The optimiser of a run; weight decay is left off vectors and scalars (biases, norms).

    ``adamw`` keeps two numbers per weight. ``adafactor`` (Shazeer and Stern 2018; PyTorch's own) keeps a row and a
    column per matrix. ``adamw8bit`` (Dettmers et al. 2022; bitsandbytes) keeps two bytes per weight.

    Raises:
        ValueError: an unknown name, or one whose package or device is not there; says what to do.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)
    if settings.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    if settings.name == "adamw8bit":
        return _adamw8bit(groups, settings.learning_rate, betas)
    raise ValueError(f"The optimizer is {settings.name!r}, expected one of {', '.join(OPTIMIZERS)}.")


def _adamw8bit(groups: list[dict], learning_rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    if not torch.cuda.is_available():
        raise ValueError(
            "The optimizer adamw8bit runs on CUDA devices and none was found: choose adafactor, which saves as much "
            "memory anywhere."
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "The optimizer adamw8bit needs the package bitsandbytes, which is not installed: install it, or choose "
            "adafactor."
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, betas=betas)


def learning_rate(step: int, steps: int, settings: Optimizer) -> float:
    """The learning rate of a step (counted from 0): a linear warm-up, then constant, or down to zero at the end.

    The cosine is that of Loshchilov and Hutter, "SGDR" (2017).
    """
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    share = min(1.0, step / max(1, steps))
    curve = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[settings.schedule]
    return settings.learning_rate * warm * curve
