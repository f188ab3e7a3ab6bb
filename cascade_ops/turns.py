"""Where the stages of a pipeline have their weights: all on the device, or each there only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from .checkpoints import inspect_file
from .free_memory import free_bytes, release_unused
from .handles import StageHandle, choose_dtype, load_stage
from .residency import DEVICE_KEEPER, MARGIN, DeviceKeeper, memory_mode

Result = TypeVar("Result")
Free = Callable[[torch.device], "int | None"]

# What a picture of 1024 x 1024 needs beside the weights, rounded up; small models are not asked for as much.
_RUNNING_BYTES = 3 * 10**9


@dataclass(frozen=True)
class StageFile:
    """A stage that has not been read. dtype: see `handles.choose_dtype`. changes: made to it when it is."""

    path: str
    stage: str
    name: str
    dtype: str
    device: torch.device
    changes: tuple[Callable[[StageHandle], StageHandle], ...] = ()

    def load(self, resident: bool) -> StageHandle:
        """Read it, straight to the device if `resident`, else to main memory."""
        handle = load_stage(
            self.path, self.stage, dtype=self.dtype, run_on=self.device, resident=resident, name=self.name
        )
        for change in self.changes:
            handle = change(handle)
        return handle

    @property
    def size(self) -> int:
        """Bytes that its weights will have, from the header alone; an upper bound for weights of 8 bits."""
        info = inspect_file(self.path).component(self.stage)
        known = self.dtype if self.dtype in ("auto", "float32") else "bfloat16"
        return info.parameters * choose_dtype(known, info, self.device).itemsize


@dataclass(frozen=True)
class Turns:
    """Runs the stages of a pipeline one after the other on a device.

    mode: as the keeper takes it. free: tells what is free. A stage that was loaded to the device runs there and stays;
    one that waits in main memory is placed by the keeper; one that was not read is read for its turn and freed after
    it, and its weights go straight to the device where they fit.
    """

    device: torch.device
    mode: str = "auto"
    keeper: DeviceKeeper = field(default_factory=lambda: DEVICE_KEEPER)
    free: Free = free_bytes

    def run(
        self,
        stage: StageHandle | StageFile,
        work: Callable[[StageHandle], Result],
        memory: Callable[[StageHandle], int] | None = None,
    ) -> Result:
        """What `work` gives for the stage where it runs; `memory` tells how many bytes it needs there to run in."""
        if isinstance(stage, StageHandle):
            return work(self._placed(stage, memory))
        try:
            return work(self._placed(self._read(stage), memory))
        finally:
            if self.device.type != "cpu":
                self.keeper.drop()
            release_unused()

    def _placed(self, handle: StageHandle, memory: Callable[[StageHandle], int] | None) -> StageHandle:
        if handle.device == self.device:
            return handle
        needed = 0 if memory is None else memory(handle)
        return self.keeper.placed([handle], [self.device], needed, self.mode)[0]

    def _read(self, file: StageFile) -> StageHandle:
        if self.device.type == "cpu":
            return file.load(resident=True)
        self.keeper.drop()
        free = self.free(self.device)
        fits = free is None or file.size + _RUNNING_BYTES + MARGIN <= free
        return file.load(resident=fits and self.mode != "streamed")


def changed(stage: StageHandle | StageFile, change: Callable[[StageHandle], StageHandle]) -> StageHandle | StageFile:
    """The stage with a change, made when it is read where that is still to come."""
    if isinstance(stage, StageFile):
        return replace(stage, changes=(*stage.changes, change))
    return change(stage)


def in_turns(
    files: Mapping[str, StageFile], device: torch.device, mode: str, free: Free = free_bytes
) -> tuple[Turns, dict[str, StageHandle | StageFile]]:
    """Load the stages as the mode says, and how to run them.

    mode: ``resident``, all on the device. ``one stage``, one at a time there; the others wait in main memory, or, where
    that is too small or is the device, are read for their turn and freed. ``streamed``, as that, with the blocks of
    Stage C and Stage B copied to a GPU as they run. ``auto``, resident where all fits in what is free, else one stage,
    streamed where even that does not fit; the environment variable ``CASCADE_MEMORY`` can say another.

    Raises ValueError for an unknown mode, and for ``streamed`` on a CPU.
    """
    mode = memory_mode(mode)
    if mode == "streamed" and device.type == "cpu":
        raise ValueError(
            "The memory mode is 'streamed', which copies weights to a GPU as they are needed, and the device is the "
            "CPU: choose 'one stage' to need less memory there, or auto."
        )
    turns = Turns(device, "auto" if mode == "resident" else mode, free=free)
    total = sum(file.size for file in files.values()) if mode != "resident" else 0
    if mode == "resident" or (mode == "auto" and _fits(total, free(device))):
        return turns, {stage: file.load(resident=True) for stage, file in files.items()}
    if device.type == "cpu" or not _fits(total, free(torch.device("cpu"))):
        return turns, dict(files)
    return turns, {stage: file.load(resident=False) for stage, file in files.items()}


def _fits(total: int, free: int | None) -> bool:
    return free is None or total + min(total, _RUNNING_BYTES) + MARGIN <= free
