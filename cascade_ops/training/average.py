"""The moving average of trained weights, which is what a run exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of parameters; faster in the first steps, so that it forgets the start.

    decay: kept per step; 0 keeps no average, and `in_place` leaves the weights as they are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = dict(parameters), decay
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after the step number `step` (from 0)."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            weights = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.values.values()), weights, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average inside the block, and their own values after it."""
        if not self.values:
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
