"""What an adapter does to one weight: it adds something to it, whatever that is made of.

Source of DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# As trainers do, so that a row or column of zeros is no division by zero.
_EPSILON = torch.finfo(torch.float32).eps


class WeightChange(ABC):
    """The change of one weight ``[out, in, ...]``. Kinds differ in what the change is made of.

    dora_scale: the learned sizes of DoRA: ``[out, 1, ...]`` one per output, ``[1, in, ...]`` one per input, ``[3, in]``
    one per input of each third of attention's fused weight; None is a plain change.
    """

    dora_scale: Tensor | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes; some files have a kernel flattened, ``[out, in * k * k]``."""

    @abstractmethod
    def delta(self) -> Tensor:
        """The change of the weight before DoRA, float32, of `shape`."""

    def misfit(self, shape: Sequence[int]) -> str:
        """Why it cannot change a weight of `shape`, in words; empty where it can."""
        shape = tuple(shape)
        flat = (shape[0], prod(shape[1:]))
        if self.shape not in (shape, flat):
            return f"it is of shape {list(self.shape)}, the weight of {list(shape)}"
        if self.dora_scale is not None and not scale_fits(self.dora_scale, shape):
            return f"its DoRA sizes are of shape {list(self.dora_scale.shape)}, the weight of {list(shape)}"
        return ""

    def added(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """What it adds to a float32 `weight`, float32. A DoRA's change counts as a whole: at half the strength the
        weight is half-way to what DoRA makes of it."""
        delta = self.delta().to(weight.device).reshape(weight.shape)
        if self.dora_scale is None:
            return strength * delta
        return strength * (rescaled(weight + delta, self.dora_scale.to(weight)) - weight)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The changed weight, float32, for a float32 `weight`; see `added`."""
        return weight + self.added(weight, strength)


def scale_fits(scale: Tensor, shape: Sequence[int]) -> bool:
    """Whether DoRA sizes are of a shape that a weight of `shape` can have."""
    ones = (1,) * (len(shape) - 2)
    return tuple(scale.shape) in {(shape[0], 1, *ones), (1, shape[1], *ones), (3, shape[1], *ones)}


def sizes(weight: Tensor, like: Tensor) -> Tensor:
    """The Euclidean sizes that DoRA learns, in the shape of `like`: of outputs, of inputs, or of inputs by thirds."""
    if like.shape[1] == 1 and len(like) == len(weight):
        return weight.flatten(1).norm(dim=1).reshape(like.shape)
    groups = weight.unflatten(0, (len(like), -1))
    return groups.transpose(1, 2).flatten(2).norm(dim=2).reshape(like.shape)


def rescaled(weight: Tensor, scale: Tensor, own: Tensor | None = None) -> Tensor:
    """`weight` with the sizes `scale` in place of `own`, which are its sizes unless given."""
    factor = scale / ((sizes(weight, scale) if own is None else own) + _EPSILON)
    return weight * factor.repeat_interleave(len(weight) // len(factor), dim=0)
