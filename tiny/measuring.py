"""What the measures of features share: rows of the table, and the chain with and without something attached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cascade_ops.checkpoints import load
from ..cascade_ops.denoisers import SteppedControl
from .drawing import Scene, render
from .evaluate import BATCH, Family
from .family import IMAGE_SIZE

SEED = 6_000


@dataclass(frozen=True)
class Row:
    """One line of the table. wanted: the goal, in words."""

    feature: str
    measure: str
    with_it: float
    without: float | None
    wanted: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Measured:
    """The rows of a feature, and pictures for a sheet: what was given, made with it, made without it."""

    rows: list[Row]
    pictures: tuple[np.ndarray, ...]


# For the pictures from `start` to `stop`, what `StageCDenoiser` takes beside text.
Attach = Callable[[int, int], dict]


def nothing(start: int, stop: int) -> dict:
    return {}


def chain(family: Family, prompts: Sequence[str], seed: int, attach: Attach = nothing) -> np.ndarray:
    """Pictures of 256 x 256 through all three stages, at the family's defaults."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        stop = min(start + BATCH, len(prompts))
        latent = family.sample_c(prompts[start:stop], seed + start, attach(start, stop))
        pictures.append(family.decode(family.sample_b(latent, prompts[start:stop], seed + start)))
    return np.concatenate(pictures)


def steered_by(path: Path, control: Tensor) -> Attach:
    """A ControlNet that reads ``control [N, ...]``."""
    controlnet, _ = load(path, expect="controlnet", dtype=torch.float32)
    with torch.inference_mode():
        residuals = controlnet(control)

    def attach(start: int, stop: int) -> dict:
        parts = [None if residual is None else residual[start:stop] for residual in residuals]
        return {"controls": [SteppedControl(parts)]}

    return attach


def drawn(scenes: Sequence[Scene], size: int = IMAGE_SIZE) -> np.ndarray:
    return np.stack([render(scene, size) for scene in scenes])
