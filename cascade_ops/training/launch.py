"""Where a run runs: one process here, or several through Hugging Face Accelerate (see `accelerated`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from .objective import Objective


class Launch(Protocol):
    """What the training loop asks of the processes that run it."""

    device: torch.device
    index: int
    processes: int

    def prepare(
        self, objective: Objective, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The objective on its device, wrapped so that gradients are shared, and the optimiser for its parameters."""
        ...

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that the model runs in."""
        ...

    def accumulating(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around all but the last of the batches of a step: gradients stay in their process."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def gather(self, values: Tensor) -> Tensor:
        """The values ``[n, ...]`` of all processes, ``[processes * n, ...]``, in the order of the processes."""
        ...

    def wait(self) -> None:
        """Until all processes are here."""
        ...


class SingleProcess:
    """One process, one device; needs nothing but PyTorch.

    precision: ``float32``, or ``bfloat16`` for autocast.
    """

    index, processes = 0, 1

    def __init__(self, device: torch.device | str | None = None, precision: str = "float32"):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = precision

    def prepare(
        self, objective: Objective, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        return objective, optimizer

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            yield

    def accumulating(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gather(self, values: Tensor) -> Tensor:
        return values

    def wait(self) -> None:
        """One process waits for nobody."""
