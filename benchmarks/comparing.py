"""Two sides of a comparison: that they agree, how long each takes in turns, and what the numbers say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


@dataclass
class Sides:
    """One case, built: what is timed on both sides and what is known about it.

    ours, theirs: do the work once; one of them is None where only the other was asked for.
    variants: other ways of ours to do it, by name.
    moved: bytes that must be read or written at least: weights once per model call, inputs and outputs.
    tolerance: how far the results may differ by `difference`, of ours and of theirs, or of `theirs_to_check` where
        theirs has to be set up in another way to compute the very same.
    prepare: what `ours` did once for a run of `prepared_steps` model calls, of which one is timed.
    counted: whether there is arithmetic to count. seconds: the run says itself how long it took.
    notes: what a reader of the row must know.
    """

    ours: Run | None
    theirs: Run | None
    variants: dict[str, Run] = field(default_factory=dict)
    moved: int = 0
    tolerance: float = 1e-4
    difference: Callable[[Any, Any], float] | None = None
    theirs_to_check: Run | None = None
    prepare: Run | None = None
    prepared_steps: int = 1
    counted: bool = True
    seconds: bool = False
    notes: list[str] = field(default_factory=list)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `theirs`; infinite where shapes differ or a
    value is not finite."""
    ours, theirs = ours.float(), theirs.float()
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def check_agreement(sides: Sides) -> float:
    """Run all sides once; how far the results of ours differ from theirs. ValueError where that is beyond the tolerance
    or not a number."""
    measure = sides.difference or difference
    theirs = (sides.theirs_to_check or sides.theirs)()
    found = max(measure(run(), theirs) for run in (sides.ours, *sides.variants.values()))
    if not found <= sides.tolerance:
        raise ValueError(
            f"The results differ by {found:.3g}, expected at most {sides.tolerance:g}: no speed is reported for two "
            "things that do not compute the same."
        )
    return found


def seconds_of(run: Run, device: torch.device) -> float:
    """How long one run takes, on a GPU by its own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def in_turns(runs: Sequence[Run], repeats: int, clock: Callable[[Run], float]) -> list[list[float]]:
    """Seconds of each run, `repeats` times; every other round in the opposite order, so that a machine that becomes
    slower or faster does so for all."""
    samples: list[list[float]] = [[] for _ in runs]
    for number in range(repeats):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            samples[index].append(clock(runs[index]))
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, spread (half the distance between the quartiles, relative to the median) and the samples."""
    median = statistics.median(samples)
    spread = 0.0
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        spread = (high - low) / 2 / median
    return {"median": median, "spread": spread, "least": min(samples), "most": max(samples), "samples": list(samples)}
