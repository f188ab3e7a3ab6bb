"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) as the reference does it.

The prediction is ``uncond + scale * (cond - uncond)``, then pulled back towards the standard deviation of the
conditional prediction (rescale: Lin et al. 2023, arXiv 2305.08891, section 3.4).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Times come from a float32 linspace; a bound typed as 0.3 must still include the step at 0.29999998.
_TIME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Guidance:
    """How strongly the conditional prediction is preferred to the unconditional one.

    scale: 1 is off; a pair is a linear ramp ``(at t = 1, at t = 0)`` over the schedule's time.
    interval: ``(t_start, t_stop)``, guidance acts where ``t_start >= t >= t_stop`` (Kynkäänniemi et al. 2024,
        arXiv 2404.07724); outside of it only the conditional prediction is computed.
    rescale: 0 leaves the guided prediction as it is, 1 gives it the conditional one's deviation; the release uses 0.7.
    rescale_over: "image" takes the deviation of each image; "batch" that of the whole batch, as the reference does,
        so that an image depends on its batch mates.
    """

    scale: float | tuple[float, float] = 1.0
    interval: tuple[float, float] = (1.0, 0.0)
    rescale: float = 0.7
    rescale_over: Literal["image", "batch"] = "image"

    def __post_init__(self) -> None:
        if isinstance(self.scale, (tuple, list)) and len(self.scale) != 2:
            raise ValueError(
                f"The guidance ramp has {len(self.scale)} values, expected two: the scale at t = 1 and at t = 0."
            )
        if not 1 >= self.interval[0] >= self.interval[1] >= 0:
            raise ValueError(
                f"The guidance interval is {self.interval}, expected 1 >= start >= stop >= 0: time runs from 1 to 0."
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"The guidance rescale is {self.rescale}, expected 0 to 1: the release uses 0.7.")
        if self.rescale_over not in ("image", "batch"):
            raise ValueError(f"Guidance rescale over '{self.rescale_over}' is unknown: use 'image' or 'batch'.")

    def scale_at(self, t: float) -> float:
        """The scale that acts at time `t`: 1 (no unconditional prediction is needed) outside the interval."""
        start, stop = self.interval
        if not start + _TIME_TOLERANCE >= t >= stop - _TIME_TOLERANCE:
            return 1.0
        if isinstance(self.scale, (tuple, list)):
            return self.scale[0] * t + self.scale[1] * (1 - t)
        return self.scale

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guided prediction from two float32 predictions ``[B, C, H, W]``."""
        guided = torch.lerp(uncond, cond, scale)
        if self.rescale == 0:
            return guided
        dims = tuple(range(1, cond.ndim)) if self.rescale_over == "image" else tuple(range(cond.ndim))
        ratio = cond.std(dims, keepdim=True) / (guided.std(dims, keepdim=True) + 1e-9)
        return guided * (self.rescale * ratio + 1 - self.rescale)
