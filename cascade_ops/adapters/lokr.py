"""LoKr: a change that is the Kronecker product of two small matrices.

Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (2023),
section 3; names and scale as in its library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .changes import WeightChange


@dataclass(frozen=True, eq=False)
class LoKrWeights(WeightChange):
    """``scale * kron(w1, w2)``: each element of `w1` times the whole of `w2`.

    w1: ``[out1, in1]``. w2: ``[out2, in2]``, or with a kernel ``[out2, in2, k, k]``. scale: alpha / rank where one of
    them was trained as a product of low rank, else 1.

    Raises:
        ValueError: `w1` is no matrix, or `w2` has fewer dimensions.
    """

    w1: Tensor
    w2: Tensor
    scale: float = 1.0
    dora_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.w1.ndim != 2 or self.w2.ndim < 2:
            raise ValueError(
                f"A LoKr has the factors {list(self.w1.shape)} and {list(self.w2.shape)}, expected [out1, in1] and "
                "[out2, in2, ...]: the file is damaged or of another kind."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1], *self.w2.shape[2:])

    def delta(self) -> Tensor:
        w1 = self.w1.float().reshape(*self.w1.shape, *(1,) * (self.w2.ndim - 2))
        return self.scale * torch.kron(w1, self.w2.float())
