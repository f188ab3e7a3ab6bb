"""A rough picture of a latent, from one matrix: each cell's channels to its colour.

Where no model is connected to decode previews, this shows where things are and in what colours, at no cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Tiny: fitted by `tiny/fit_previews.py`, which says how well. Release: the factors that ComfyUI publishes for previews
# (its latent formats SC_Prior and SC_B), moved from -1..1 to 0..1.
MAPS = Path(__file__).parent / "data" / "latent_preview.json"

# The longer side of a preview, in pixels, if it would be smaller.
_SIDE = 256


@dataclass(frozen=True)
class PreviewMap:
    """Colours of the cells of a latent: ``samples @ weight + bias``; weight ``[C, 3]``, bias ``[3]``, colours 0..1."""

    weight: Tensor
    bias: Tensor

    def colours(self, samples: Tensor) -> Tensor:
        """A colour ``[B, h, w, 3]``, 0..1, for each cell of ``[B, C, h, w]``; float32 in main memory."""
        cells = samples.float().cpu().permute(0, 2, 3, 1)
        return (cells @ self.weight + self.bias).clamp(0, 1)

    def show(self, samples: Tensor) -> Tensor:
        """Pictures ``[B, H, W, 3]``, 0..1, with the longer side 256 pixels or one per cell, whichever is more."""
        colours = self.colours(samples).permute(0, 3, 1, 2)
        factor = max(1.0, _SIDE / max(colours.shape[-2:]))
        size = [round(side * factor) for side in colours.shape[-2:]]
        return F.interpolate(colours, size=size, mode="bilinear").permute(0, 2, 3, 1)


@cache
def preview_map(family: str, stage: str) -> PreviewMap | None:
    """The map for latents that a stage of a family samples (see `StageHandle.family`); None where there is none."""
    found = json.loads(MAPS.read_text(encoding="utf-8")).get(family, {}).get(stage)
    return None if found is None else PreviewMap(torch.tensor(found["weight"]), torch.tensor(found["bias"]))
