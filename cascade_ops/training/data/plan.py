"""Which picture each sample of each step is: a fixed function of the seed and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_ORDER, _FILL, _CAPTION, _CROP, _PRIOR = range(5)  # kinds of random numbers


class Choice(NamedTuple):
    """What one sample of a step is.

    index: place in the list of the bucket's pictures, or of its prior latents. prior: which of the two. caption: 0..1,
    chooses among the captions. across, down: 0..1, where a random crop cuts.
    """

    index: int
    prior: bool
    caption: float
    across: float
    down: float


@dataclass
class Plan:
    """The order of a run.

    A pass over the data shows every picture as often as its source's `repeats` say, in batches of one bucket each, in
    random order. A bucket's last batch is filled up with pictures of the bucket, drawn again from the start of its
    order.

    pictures: for each bucket, one number per showing in a pass: the place of the picture in the bucket.
    prior: share of all samples that are prior latents; priors: how many of them each bucket has.
    """

    seed: int
    pictures: Sequence[Sequence[int]]
    prior: float = 0.0
    priors: Sequence[int] = ()
    _pass: tuple[tuple[int, int], list[tuple[int, np.ndarray]]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Samples in a pass."""
        return sum(len(bucket) for bucket in self.pictures)

    def steps_in_a_pass(self, batch: int) -> int:
        """Batches that a pass takes."""
        size = self._pictures_in(batch)
        return sum(-(-len(bucket) // size) for bucket in self.pictures)

    def _pictures_in(self, batch: int) -> int:
        """The most pictures, prior latents aside, that a batch shows."""
        return max(1, math.ceil(batch * (1 - self.prior) - 1e-9))

    def choose(self, step: int, batch: int, positions: Sequence[int]) -> tuple[int, list[Choice]]:
        """The bucket of a step, and the samples at these positions of its batch.

        Other positions change nothing, so that processes may share a batch in any way.
        """
        first, size = step * batch, self._pictures_in(batch)
        # With few samples and a large share some steps are all prior; pictures go on where the last one stopped.
        done = step if batch * (1 - self.prior) >= 1 else first - int(first * self.prior)
        turn, place = divmod(done, self.steps_in_a_pass(batch))
        if self._pass is None or self._pass[0] != (turn, size):
            self._pass = ((turn, size), self._batches(turn, size))
        bucket, shown = self._pass[1][place]
        return bucket, [self._choice(bucket, shown, step, first, position) for position in positions]

    def _batches(self, turn: int, batch: int) -> list[tuple[int, np.ndarray]]:
        """All batches of a pass, in order."""
        batches = []
        for number, bucket in enumerate(self.pictures):
            if not len(bucket):
                continue
            order = np.asarray(bucket)[self._generator(_FILL, turn, number).permutation(len(bucket))]
            count = -(-len(bucket) // batch)
            filled = np.resize(order, count * batch)
            batches += [(number, part) for part in filled.reshape(count, batch)]
        order = self._generator(_ORDER, turn).permutation(len(batches))
        return [batches[index] for index in order]

    def _choice(self, bucket: int, shown: np.ndarray, step: int, first: int, position: int) -> Choice:
        """first: number of the step's first sample in the whole run."""
        caption = self._generator(_CAPTION, step, position).random()
        across, down = self._generator(_CROP, step, position).random(2)
        # Prior latents are spread evenly, so that small batches and all processes get their share.
        priors = [int((first + place) * self.prior) for place in (0, position, position + 1)]
        if priors[2] > priors[1]:
            index = int(self._generator(_PRIOR, step, position).integers(self.priors[bucket]))
            return Choice(index, True, caption, across, down)
        place = position - (priors[1] - priors[0])
        return Choice(int(shown[place % len(shown)]), False, caption, across, down)

    def _generator(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what])
