"""A loaded stage and what is known about it: the value on the wires between nodes."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoints import FileInfo, inspect_file, load
from .checkpoints.errors import STAGE_TITLES, shown

if TYPE_CHECKING:
    from .text import TextEncoder

FIXED_FLOAT16 = "float16 (fixed weights)"
DTYPES = ("auto", "bfloat16", "float32", "float16", FIXED_FLOAT16)

# The published Stage C of 3.6B overflows in float16; the lite one of 1B does not.
_OVERFLOWING_PARAMETERS = 2_000_000_000
# Smaller models run in float32 anywhere: it costs next to nothing.
_SMALL_PARAMETERS = 100_000_000


@dataclass(frozen=True, eq=False)
class StageHandle:
    """One loaded model. Immutable: nothing changes `module`, and `to` gives another handle.

    module: a model of `cascade_ops.models`, or a `TextEncoder`. info: what its file is. name: the file as the user
    knows it.
    """

    stage: str
    module: Any
    info: FileInfo
    name: str

    @property
    def device(self) -> torch.device:
        return next(_network(self.module).parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(_network(self.module).parameters()).dtype

    @property
    def size_in_bytes(self) -> int:
        """Memory of the weights."""
        tensors = _network(self.module).state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def title(self) -> str:
        """Stage, size and file in words: ``Stage C 1B lite (stage_c_lite.safetensors)``."""
        return f"{self.info.title} ({self.name})"

    @property
    def family(self) -> str:
        """``tiny`` for the bundled family, ``release`` for published sizes, empty for anything else."""
        if self.info.size == "tiny":
            return "tiny"
        return "release" if self.info.rank <= 1 else ""

    def to(self, device: torch.device | str) -> StageHandle:
        """This stage on `device`: itself if it is there, else a new handle with its own copy of the weights."""
        device = torch.empty(0, device=device).device
        if self.device == device:
            return self
        if self.stage == "text_encoder":
            return replace(self, module=self.module.to(device))
        return replace(self, module=_copied(self.module, device))

    def expect(self, stage: str) -> StageHandle:
        """This handle; ValueError where it is another stage."""
        if self.stage != stage:
            raise ValueError(
                f"{self.title} was given where a {STAGE_TITLES[stage]} is read: connect the loader of that stage."
            )
        return self


def _network(module: nn.Module | TextEncoder) -> nn.Module:
    return module if isinstance(module, nn.Module) else module.module


def _copied(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with all weights and buffers on `device`; the original keeps its own."""
    moved: dict[int, object] = {}
    for parameter in module.parameters():
        moved[id(parameter)] = nn.Parameter(parameter.to(device), requires_grad=False)
    for buffer in module.buffers():
        moved[id(buffer)] = buffer.to(device)
    # deepcopy takes what the memo already holds instead of copying it.
    return copy.deepcopy(module, moved)


def load_stage(
    path: str | Path,
    stage: str,
    *,
    dtype: str = "auto",
    run_on: torch.device | str = "cpu",
    resident: bool = False,
    name: str | None = None,
) -> StageHandle:
    """Load the `stage` that a file is or holds.

    dtype: one of DTYPES, see `choose_dtype`. run_on: the device it will run on. resident: put the weights there; else
    they wait in main memory. name: what to call the file in messages.

    Raises ValueError (CheckpointError) for a file that is something else or cannot be read, and for float16 where the
    model would overflow.
    """
    path = Path(path)
    info = inspect_file(path).component(stage)
    device = torch.empty(0, device=run_on).device
    chosen = choose_dtype(dtype, info, device)
    module, info = load(info, stage, dtype=chosen, device=device if resident else "cpu")
    return StageHandle(stage, module, replace(info, recipes={}), name or shown(path))


def choose_dtype(dtype: str, info: FileInfo, device: torch.device) -> torch.dtype:
    """The dtype to run a model in.

    ``auto`` is float32 for small models (below 100 M parameters) and where there is no fast bfloat16 (CPU, older
    GPUs), and bfloat16 on GPUs that have it. On a CPU whose main memory is less than twice the float32 weights, it is
    bfloat16 too: slow, but it fits.

    Raises ValueError for an unknown name, and for float16 with a full-size Stage C, whose activations overflow in it.
    ``float16 (fixed weights)`` is for files that were rescaled for float16 and is not refused.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    if dtype == "float16" and info.stage == "stage_c" and info.parameters > _OVERFLOWING_PARAMETERS:
        raise ValueError(
            f"{shown(info.path)} is {info.title}, whose activations overflow in float16 and give black pictures: "
            f"choose auto, bfloat16 or float32 (or '{FIXED_FLOAT16}' for a file that was rescaled for float16)."
        )
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(dtype, torch.float16)
    if info.parameters < _SMALL_PARAMETERS:
        return torch.float32
    if device.type == "cuda":
        # Older GPUs only emulate bfloat16.
        fast = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if fast else torch.float32
    memory = _main_memory()
    tight = device.type == "cpu" and memory is not None and info.parameters * 4 > memory / 2
    return torch.bfloat16 if tight else torch.float32


def _main_memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
