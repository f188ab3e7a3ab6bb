"""What a model predicts, and how a prediction becomes a clean latent and a noise.

Each target is three formulas over ``x = a * x0 + b * epsilon``. Cascade's published weights predict `epsilon`;
finetunes with the reference's ``edm_objective`` predict `v`. Source: `gdf/targets.py` in Stability-AI/StableCascade
and the papers named below.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """One kind of prediction.

    `make(x0, epsilon, a, b)` is what the model is trained to give; `x0(x, prediction, a, b)` and
    `epsilon(x, prediction, a, b)` read the clean latent and the noise from it. All tensors broadcast.
    """

    make: Formula
    x0: Formula
    epsilon: Formula


EPSILON = Target(
    make=lambda x0, epsilon, a, b: epsilon,
    x0=lambda x, prediction, a, b: (x - b * prediction) / a,
    epsilon=lambda x, prediction, a, b: prediction,
)
"""The noise (Ho et al. 2020, arXiv 2006.11239)."""

X0 = Target(
    make=lambda x0, epsilon, a, b: x0,
    x0=lambda x, prediction, a, b: prediction,
    epsilon=lambda x, prediction, a, b: (x - a * prediction) / b,
)
"""The clean latent."""

V = Target(
    make=lambda x0, epsilon, a, b: a * epsilon - b * x0,
    x0=lambda x, prediction, a, b: (a * x - b * prediction) / (a * a + b * b),
    epsilon=lambda x, prediction, a, b: (b * x + a * prediction) / (a * a + b * b),
)
"""The velocity along the VP path (Salimans and Ho 2022, arXiv 2202.00512)."""

# The reference leaves out the division because it only uses this target where a + b = 1; with it, VP works too.
RECTIFIED_FLOW = Target(
    make=lambda x0, epsilon, a, b: epsilon - x0,
    x0=lambda x, prediction, a, b: (x - b * prediction) / (a + b),
    epsilon=lambda x, prediction, a, b: (x + a * prediction) / (a + b),
)
"""The direction from picture to noise (Liu et al. 2022, arXiv 2209.03003)."""

TARGETS: dict[str, Target] = {"epsilon": EPSILON, "x0": X0, "v": V, "rectified_flow": RECTIFIED_FLOW}
