"""What a kind of training is, to the training loop: a module that gives a loss, and files that it leaves behind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .draws import Draws

# What a sample holds, by name; tensors gain a batch dimension, everything else becomes a list.
# image                [B, 3, H, W] float32 0..1, one bucket's size
# stage_c_latent       [B, 16, h, w]    of the picture at 3/4 of its size
# stage_a_latent       [B, 4, H/4, W/4]
# text, text_pooled    [B, 77, C], [B, 1, P]   of the caption
# image_embedding      [B, 1, E]
# caption              list of B strings
# name                 list of B strings, for messages
# loss_weight          [B]
# maps                 [B, K, m, n] int64 class maps (tiny family)
# attributes           dict of [B] int64 class indices (tiny family)
Batch = dict[str, Any]


@dataclass(frozen=True)
class StepResult:
    """One step's loss.

    loss: scalar. error: unweighted error of each sample ``[B]``, and log_snr: its noise level ``[B]``; both or neither.
    figures: further scalars for the log.
    """

    loss: Tensor
    error: Tensor | None = None
    log_snr: Tensor | None = None
    figures: dict[str, Tensor] = field(default_factory=dict)


class LearnsFromErrors(Protocol):
    """Part of an objective that changes with the errors that it sees: the loss with its adaptive weight."""

    def observe(self, log_snr: Tensor, error: Tensor) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Objective(nn.Module):
    """Base of all kinds of training; parameters that require a gradient are trained, in float32.

    needs: which entries of a batch `forward` reads. loss: what learns from errors, where there is something.
    """

    needs: frozenset[str] = frozenset()
    loss: LearnsFromErrors | None = None

    @abstractmethod
    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        """The loss of a batch that is on this module's device; `draws` has all random numbers."""

    def observe(self, log_snr: Tensor, error: Tensor) -> None:
        """Learn from the errors of all processes' samples (the adaptive loss weight does)."""
        if self.loss is not None:
            self.loss.observe(log_snr, error)

    def at(self, step: int, steps: int) -> None:
        """Called before each step: for phases of a run."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside parameters and buffers."""
        return {} if self.loss is None else self.loss.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if self.loss is not None:
            self.loss.load_state(state)

    @abstractmethod
    def export(self, folder: Path, name: str) -> list[Path]:
        """Write the finished files from the weights as they are; returns their paths."""

    def sample(self, prompts: list[str], pictures: list[Tensor], seed: int, steps: int) -> Tensor | None:
        """Stage C latents ``[N, 16, h, w]`` or finished pictures ``[N, 3, H, W]`` that show what was learned so far;
        None where there is nothing to show."""
        return None


@dataclass(frozen=True)
class TrainingStep:
    """What is known after a step.

    step: the number of steps done, from 1. loss: mean over the samples of all processes. error, log_snr: of these
    samples, ``[B]`` on the CPU, where the target has them. figures: further means.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    error: Tensor | None = None
    log_snr: Tensor | None = None
    figures: dict[str, float] = field(default_factory=dict)


Report = Callable[[TrainingStep], None]


@dataclass(frozen=True)
class Trained:
    """What a run has given.

    files: written by `Objective.export`. steps: done. losses: one per step. objective: the trained modules, with
    their averaged weights where there is an average. finished: False where the run was stopped before its last step.
    """

    files: list[Path]
    steps: int
    losses: list[float]
    objective: Objective
    finished: bool = True


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name.

    Raises:
        ValueError: one of them is not float32: small changes of a 16-bit weight are lost to rounding.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"'{name}' is {parameter.dtype} and was to be trained, expected float32: changes below the rounding of "
                "a 16-bit weight are lost, load it as float32 and set precision to bfloat16 to save time."
            )
    return parameters
