"""How much each noise level counts in the training loss.

Fixed weights are functions of the log-SNR; `AdaptiveLossWeight` learns its own from the losses it is shown. Formulas
from `gdf/loss_weights.py` in Stability-AI/StableCascade and the papers named below; they weight an epsilon loss.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def constant(log_snr: Tensor) -> Tensor:
    """1 everywhere."""
    return torch.ones_like(log_snr)


def snr(log_snr: Tensor) -> Tensor:
    """The signal-to-noise ratio: an epsilon loss weighted so is a clean-latent loss."""
    return log_snr.exp()


def p2(log_snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """``(k + SNR) ** -gamma`` (Choi et al. 2022, arXiv 2204.00227); the reference's default."""
    return (k + log_snr.exp()) ** -gamma


def min_snr(log_snr: Tensor, maximum: float = 5.0) -> Tensor:
    """SNR cut at `maximum` (Hang et al. 2023, arXiv 2303.09556)."""
    return log_snr.exp().clamp(max=maximum)


def sech(log_snr: Tensor, width: float = 2.0) -> Tensor:
    """``1 / cosh(log_snr / width)``, a bell around equal signal and noise (Kingma and Gao 2023, arXiv 2303.00848)."""
    return 1 / torch.cosh(log_snr / width)


def debiased(log_snr: Tensor) -> Tensor:
    """``1 / sqrt(SNR)`` (Yu et al. 2023, arXiv 2310.08442)."""
    return torch.exp(-0.5 * log_snr)


def sigmoid(log_snr: Tensor) -> Tensor:
    """``sigmoid(log_snr)``, the share of signal in the variance (Kingma and Gao 2023)."""
    return torch.sigmoid(log_snr)


LOSS_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": constant,
    "debiased": debiased,
    "min_snr": min_snr,
    "p2": p2,
    "sech": sech,
    "sigmoid": sigmoid,
    "snr": snr,
}


def loss_weight(name: str, log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """Weight of each level in ``log_snr [B]``; `shift` moves the curve as `log_snr_at` moves the schedule.

    Raises ValueError for an unknown name.
    """
    if name not in LOSS_WEIGHTS:
        raise ValueError(f"There is no loss weight '{name}': choose one of {', '.join(LOSS_WEIGHTS)}.")
    return LOSS_WEIGHTS[name](log_snr + 2 * math.log(shift))


class AdaptiveLossWeight:
    """Weight ``1 / E[loss | log_snr]``: every noise level ends up with the same share of the gradient.

    The expectation is a running mean per bucket of log-SNR, 1 at the start. The reference's values are the defaults:
    300 buckets, the outer two open-ended. They need very large batches to fill; with small ones take about 24 buckets
    and ``interpolate=True``, where buckets are points on the log-SNR axis, a loss is shared between its two
    neighbours, and the weight is read between them.

    buckets: how many, at least 3. log_snr_range: ends of the bucketed range. beta: what the running mean keeps per
    sample. weight_range: bounds of the weight.
    """

    def __init__(
        self,
        buckets: int = 300,
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        beta: float = 0.99,
        weight_range: tuple[float, float] = (1e-7, 1e7),
        interpolate: bool = False,
    ):
        if buckets < 3 or not log_snr_range[0] < log_snr_range[1] or not 0 <= beta < 1:
            raise ValueError(
                f"Adaptive loss weight got {buckets} buckets over {log_snr_range} with beta {beta}, expected at least "
                "3 buckets, a rising range and a beta of at least 0 and below 1: correct these settings."
            )
        self.beta = beta
        self.weight_range = weight_range
        self.interpolate = interpolate
        # Edges between buckets (so one fewer than buckets), or the points themselves.
        self.positions = torch.linspace(*log_snr_range, buckets if interpolate else buckets - 1)
        self.losses = torch.ones(buckets)

    def _shares(self, log_snr: Tensor) -> Tensor:
        """How much each level belongs to each bucket: ``[B, buckets]`` on the CPU, rows sum to 1."""
        log_snr = log_snr.detach().float().cpu().reshape(-1)
        if not self.interpolate:
            return torch.nn.functional.one_hot(torch.searchsorted(self.positions, log_snr), len(self.losses)).float()
        spacing = self.positions[1] - self.positions[0]
        inside = log_snr.clamp(self.positions[0], self.positions[-1])
        return (1 - (inside[:, None] - self.positions).abs() / spacing).clamp(min=0)

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Weight of each level in ``log_snr [B]``: float32 ``[B]`` on its device."""
        expected = self._shares(log_snr) @ self.losses
        return (1 / expected).clamp(*self.weight_range).view(log_snr.shape).to(log_snr.device)

    def update(self, log_snr: Tensor, loss: Tensor) -> None:
        """Show the unweighted losses ``[B]`` of a batch at ``log_snr [B]``; a non-finite loss is left out."""
        loss = loss.detach().float().cpu().reshape(-1)
        finite = loss.isfinite()
        shares = self._shares(log_snr)[finite]
        counts = shares.sum(0)
        mean = (shares.T @ loss[finite]) / counts.clamp(min=1e-12)
        # n samples in one bucket count as n updates, whatever their order.
        keep = self.beta**counts
        self.losses = torch.where(counts > 0, keep * self.losses + (1 - keep) * mean, self.losses)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        return {"positions": self.positions.clone(), "losses": self.losses.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state; ValueError when it has another number of buckets."""
        if state["losses"].shape != self.losses.shape or state["positions"].shape != self.positions.shape:
            raise ValueError(
                f"The saved adaptive loss weight has {len(state['losses'])} buckets, expected {len(self.losses)}: "
                "resume with the settings of the first run."
            )
        self.positions, self.losses = state["positions"].clone().float(), state["losses"].clone().float()
