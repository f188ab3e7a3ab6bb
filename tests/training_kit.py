"""A training small enough to go through in milliseconds: a linear map that learns to add up its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stable_cascade_nodes.cascade_ops.diffusion import AdaptiveLossWeight
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.objective import Batch, Objective, StepResult
from stable_cascade_nodes.cascade_ops.training.settings import Optimizer, Settings
from stable_cascade_nodes.cascade_ops.training.trainer import Trainer

WIDTH = 4


class SumObjective(Objective):
    """Learns the sum of its input; noise, dropout and an adaptive weight as the real ones have them."""

    needs = frozenset({"x"})

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.weight = AdaptiveLossWeight(8, (-9.3, 9.3), beta=0.5, interpolate=True)

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        x = batch["x"] + 0.1 * draws.normal(WIDTH)
        log_snr = draws.uniform() * 10 - 5
        error = (self.module(x) - x.sum(dim=1, keepdim=True)).square().mean(dim=1)
        loss = (error * self.weight(log_snr)).mean()
        return StepResult(loss, error.detach(), log_snr, {"mse": error.detach().mean()})

    def observe(self, log_snr: Tensor, error: Tensor) -> None:
        self.weight.update(log_snr, error)

    def state(self) -> dict[str, Tensor]:
        return self.weight.state_dict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.weight.load_state_dict(state)

    def export(self, folder: Path, name: str) -> list[Path]:
        return []


class Numbers:
    """Batches of random vectors, named by step and position; `broken` is the name of one that is infinite."""

    def __init__(self, broken: str = ""):
        self.broken = broken

    def batches(self, first_step: int, last_step: int, global_batch: int, positions: Sequence[int]) -> Iterator[Batch]:
        for step in range(first_step, last_step):
            names = [f"{step}/{position}" for position in positions]
            rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(step * 97 + p)) for p in positions]
            rows = [row * float("inf") if name == self.broken else row for name, row in zip(names, rows, strict=True)]
            yield {"x": torch.stack(rows), "name": names}


def settings(folder: Path, **changes) -> Settings:
    """Twelve steps of four samples."""
    optimizer = Optimizer(learning_rate=0.02, schedule="cosine", warmup=2, ema=0.8)
    optimizer = replace(optimizer, **changes.pop("optimizer", {}))
    base = Settings("stage_c", str(folder), steps=12, batch_size=4, seed=3, save_every=5, optimizer=optimizer)
    return replace(base, **changes)


def trainer(folder: Path, objective: Objective | None = None, data: Numbers | None = None, launch=None, **changes):
    """A trainer on the CPU; settings may change, `report` and `stop` are passed on."""
    hooks = {name: changes.pop(name) for name in ("report", "stop") if name in changes}
    return Trainer(
        objective or SumObjective(),
        data or Numbers(),
        settings(folder, **changes),
        launch or SingleProcess("cpu"),
        **hooks,
    )
