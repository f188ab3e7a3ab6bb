"""Several processes, through Hugging Face Accelerate: DDP or FSDP2, as ``accelerate config`` or its flags say.

The same command runs on one process and on many: ``accelerate launch`` sets the environment that `Accelerator` reads.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .launch import Launch, SingleProcess
from .objective import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator


class Accelerated:
    """`launch.Launch` on an `Accelerator`.

    precision: ``float32`` or ``bfloat16`` for autocast. accelerator: one that is set up already.

    Raises:
        RuntimeError: a launcher started several processes, but they do not find each other.
    """

    def __init__(self, precision: str = "float32", accelerator: Accelerator | None = None):
        if accelerator is None:
            from accelerate import Accelerator

            # Where a launcher other than its own starts processes without a device, Accelerate has to be told that
            # they belong together; else each would train by itself, and write over the files of the others.
            devices = getattr(torch, "accelerator", torch.cuda)  # PyTorch before 2.6 has no `torch.accelerator`
            accelerator = Accelerator(
                mixed_precision="bf16" if precision == "bfloat16" else "no",
                cpu=launched() and not devices.is_available(),
            )
        self.accelerator = accelerator
        self.device, self.index, self.processes = (
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
        )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.processes != started:
            raise RuntimeError(
                f"The launcher started {started} processes and Accelerate joined {self.processes}, expected all of "
                "them: start them with accelerate launch, and with its flag --cpu where there is no GPU."
            )

    def prepare(
        self, objective: Objective, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        # One call for both: FSDP2 replaces the parameters and has to tell the optimiser.
        return self.accelerator.prepare(objective, optimizer)

    def autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    def accumulating(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(wrapped)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.to(self.device))

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def launched() -> bool:
    """Whether this process was started by a launcher that has started others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or os.environ.get("ACCELERATE_USE_FSDP", "") == "true"


def default_launch(precision: str) -> Launch:
    """One process here, or those that a launcher has started; precision: ``float32`` or ``bfloat16``."""
    return Accelerated(precision) if launched() else SingleProcess(precision=precision)
