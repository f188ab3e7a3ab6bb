"""Inner levels of Stage B that are not computed in every step: an approximation, off unless it is asked for.

Source of the idea: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free" (2023, arXiv 2312.00858).
From one step to the next the inner levels of a U-Net, which see the picture small, change little. So some steps run
the outer levels alone and take what the inner ones gave them when these were last computed. The outer levels read the
latent of their own step, and the result differs from the plain run's.

A handle carries an `InnerReuse`. A run turns it into a `ReusedSteps`, from its times and its guidance, and what is kept
meanwhile lives in a `Kept` that the denoiser makes for each run: nothing is left in the model or the handle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from .diffusion import step_times

if TYPE_CHECKING:
    from .handles import StageHandle
    from .stages import SamplingSettings
    from .windows import Windows

# Times come from a float32 linspace; a bound typed as 0.3 must still include the step at 0.29999998.
_TIME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class InnerReuse:
    """How the inner levels are reused.

    every: at least one of so many steps computes them, 2 or more. outer: how many of the outermost levels every step
    computes, 1 or more and fewer than the model has. start, end: times between which they are reused; time runs from 1
    (noise) to 0 (picture).

    Raises ValueError for other values.
    """

    every: int = 2
    outer: int = 2
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 2:
            raise ValueError(
                f"The inner blocks are to be computed every {self.every} steps, expected 2 or more: 2 reuses them in "
                "every other step; leave the reuse out to compute them in all."
            )
        if self.outer < 1:
            raise ValueError(
                f"Every step is to compute {self.outer} outer levels, expected 1 or more: they read the step's latent."
            )
        if not 1 >= self.start > self.end >= 0:
            raise ValueError(
                f"Inner blocks are to be reused from {self.start:g} to {self.end:g}, expected 1 >= start > end >= 0: "
                "time runs from 1 (noise) to 0 (picture)."
            )

    def steps(self, times: Sequence[float], guided: Sequence[bool]) -> tuple[bool, ...]:
        """For each step of a run whether it reuses what an earlier one computed.

        times: at which the steps begin. guided: whether each runs both halves of guidance; a step with another number
        of halves than the last that was computed is computed too.
        """
        found: list[bool] = []
        last = None
        for index, (time, halves) in enumerate(zip(times, guided, strict=True)):
            acts = self.start + _TIME_TOLERANCE >= time >= self.end - _TIME_TOLERANCE
            fresh = last is None or not acts or index - last >= self.every or halves != guided[last]
            last = index if fresh else last
            found.append(not fresh)
        return tuple(found)

    def describe(self) -> str:
        """In words: ``computes the outermost level in every step and the others every 2 steps``."""
        levels = "the outermost level" if self.outer == 1 else f"the {self.outer} outermost levels"
        part = "" if (self.start, self.end) == (1, 0) else f", reused from time {self.start:g} to {self.end:g}"
        return f"computes {levels} in every step and the others every {self.every} steps{part}"


def reuse_inner(stage_b: StageHandle, reuse: InnerReuse) -> StageHandle:
    """The handle with `reuse`, an approximation; the weights are shared, and the given handle stays as it is.

    Raises ValueError for another stage, for one that reuses already, and where the model has no inner levels left.
    """
    before = stage_b.expect("stage_b").reuse
    if before is not None:
        raise ValueError(
            f"{stage_b.title} already {before.describe()}, expected one that does not reuse anything: connect "
            "it from before the node that set this."
        )
    levels = len(stage_b.module.c_hidden)
    if reuse.outer >= levels:
        raise ValueError(
            f"Every step is to compute {reuse.outer} levels and {stage_b.title} has {levels}, expected 1 to "
            f"{levels - 1}: none would be left to reuse."
        )
    return replace(stage_b, reuse=reuse)


@dataclass(frozen=True)
class ReusedSteps:
    """What a run reuses. outer: levels that every step computes. steps: for each step whether it reuses the others."""

    outer: int
    steps: tuple[bool, ...]

    def describe(self) -> str:
        """In words, for the node that sampled."""
        return f"approximation: inner blocks computed in {self.steps.count(False)} of {len(self.steps)} steps"


def reused_steps(handle: StageHandle, settings: SamplingSettings) -> ReusedSteps | None:
    """What a run with these settings reuses; None where the handle reuses nothing.

    Raises ValueError where it is to and no step of this run can.
    """
    if handle.reuse is None:
        return None
    settings = settings.for_model(handle)
    guidance = settings.as_guidance()
    times = step_times(settings.steps, settings.start, settings.end)[:-1].tolist()
    steps = handle.reuse.steps(times, [guidance.scale_at(time) != 1 for time in times])
    if not any(steps):
        raise ValueError(
            f"{handle.title} {handle.reuse.describe()}, and none of the {len(steps)} steps of this run can reuse "
            "them, expected two steps in a row between these times that are both guided or both not: raise steps, "
            "widen the times, or leave the reuse out."
        )
    return ReusedSteps(handle.reuse.outer, steps)


class Kept:
    """What the inner levels gave in one run, from the step that computed it to the last that takes it."""

    def __init__(self, reused: ReusedSteps) -> None:
        self._reused = reused
        self._tensors: dict[int, Tensor] = {}

    def at(self, index: int) -> InnerStep:
        """For the step `index`."""
        return InnerStep(self, index)


@dataclass(frozen=True)
class InnerStep:
    """What the inner levels give in one step, for `CascadeUNet.step`.

    part: number of the window that is predicted; each has its own.
    """

    kept: Kept
    index: int
    part: int = 0

    @property
    def outer(self) -> int:
        """Levels that are computed in any case."""
        return self.kept._reused.outer

    def of(self, part: int) -> InnerStep:
        """The same for another window."""
        return replace(self, part=part)

    def take(self) -> Tensor | None:
        """What the outermost of the inner levels gave, ``[N, rows, columns, c]``; None where it is to be computed."""
        if not self.kept._reused.steps[self.index]:
            return None
        tensors = self.kept._tensors
        return tensors[self.part] if self._needed_later else tensors.pop(self.part)

    def keep(self, given: Tensor) -> None:
        """Keep what it gave, where the next step takes it."""
        if self._needed_later:
            self.kept._tensors[self.part] = given

    @property
    def _needed_later(self) -> bool:
        following = self.index + 1
        return following < len(self.kept._reused.steps) and self.kept._reused.steps[following]


def kept_bytes(stage_b: StageHandle, pictures: int, windows: Windows, guided: bool = True) -> int:
    """Bytes that are kept from step to step while so many pictures are sampled in these windows; 0 without reuse."""
    if stage_b.reuse is None:
        return 0
    level = stage_b.reuse.outer
    rows, columns = (sum(math.ceil(len(part.weights) / 2**level) for part in axis) for axis in windows)
    halves = 2 if guided else 1
    return pictures * halves * rows * columns * stage_b.module.c_hidden[level] * stage_b.dtype.itemsize
