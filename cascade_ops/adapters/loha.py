"""LoHa: a change that is the elementwise product of two low-rank matrices, so that its rank is up to r * r.

Source: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning" (2021),
propositions 1 and 3 (the Tucker form of kernels); names and scale as in Yeh et al., "Navigating Text-To-Image
Customization: From LyCORIS Fine-Tuning to Model Evaluation" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .changes import WeightChange


@dataclass(frozen=True, eq=False)
class LoHaWeights(WeightChange):
    """``alpha / r * (A1 @ B1) * (A2 @ B2)``.

    w1_a, w2_a: ``[out, r]``; w1_b, w2_b: ``[r, in]``, with a kernel ``[r, in * k * k]`` or ``[r, in, k, k]``. With the
    cores t1 and t2 ``[r, r, k, k]`` of a kernel they are ``[r, out]`` and ``[r, in]``, and each factor is the core
    multiplied by both along its ranks.

    Raises:
        ValueError: the shapes do not belong together.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    dora_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self._factor_shape(self.w1_a, self.w1_b, self.t1) != self._factor_shape(self.w2_a, self.w2_b, self.t2):
            raise ValueError(
                f"A LoHa has the factors {list(self.w1_a.shape)} and {list(self.w1_b.shape)}, {list(self.w2_a.shape)} "
                f"and {list(self.w2_b.shape)}, expected two pairs that give one shape: the file is damaged or of "
                "another kind."
            )

    @staticmethod
    def _factor_shape(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[int, ...]:
        inner = (a.shape[1], b.shape[0]) if core is None else (a.shape[0], b.shape[0])
        expected = inner[:1] * 2 if core is None else tuple(core.shape[:2])
        if a.ndim != 2 or b.ndim < 2 or (core is not None and b.ndim > 2) or inner != expected:
            of = "" if core is None else f" and the core {list(core.shape)}"
            raise ValueError(
                f"A LoHa has the factors {list(a.shape)} and {list(b.shape)}{of}, whose ranks differ: the file is "
                "damaged or of another kind."
            )
        return (a.shape[0], *b.shape[1:]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])

    @property
    def shape(self) -> tuple[int, ...]:
        return self._factor_shape(self.w1_a, self.w1_b, self.t1)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / len(self.w1_b)

    def delta(self) -> Tensor:
        first, second = product(self.w1_a, self.w1_b, self.t1), product(self.w2_a, self.w2_b, self.t2)
        return self.scale * first * second


def product(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """``a @ b``, or with a core ``[r, s, k, k]`` its Tucker product with ``a [r, out]`` and ``b [s, in]``; float32."""
    if core is None:
        return (a.float() @ b.float().flatten(1)).reshape(len(a), *b.shape[1:])
    return torch.einsum("rs...,ro,si->oi...", core.float(), a.float(), b.float())
