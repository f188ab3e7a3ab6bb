"""The random numbers of one training step, sample by sample.

Sample ``p`` of step ``s`` draws from a generator of its own, seeded with the run's seed, ``s`` and ``p``. So what it
sees depends neither on how many processes share the batch, nor on its neighbours, nor on whether the run was stopped
and resumed in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STEP, _POSITION = 1_000_003, 7_919


class Draws:
    """Random numbers for the samples at `positions` of the whole batch of a step; everything comes back on the CPU.

    The order of calls matters, as with any generator.
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int]):
        self.positions = list(positions)
        self._seed, self._step = seed, step
        self._generators = [
            torch.Generator().manual_seed(((seed * _STEP + step) * _POSITION + position) % 2**63)
            for position in self.positions
        ]

    def shared(self) -> torch.Generator:
        """A generator for what all samples of the step share: the same in every process, and the same at each call."""
        return torch.Generator().manual_seed((-(self._seed * _STEP + self._step) - 1) % 2**63)

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, *shape: int) -> Tensor:
        """Unit normal numbers ``[B, *shape]``."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1, ``[B, *shape]``."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])

    def chosen(self, probability: float, *shape: int) -> Tensor:
        """True with this probability, bool ``[B, *shape]``."""
        return self.uniform(*shape) < probability

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to ``high - 1``, int64 ``[B, *shape]``."""
        return torch.stack([torch.randint(high, shape, generator=generator) for generator in self._generators])
