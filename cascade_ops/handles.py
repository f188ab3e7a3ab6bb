"""A loaded stage and what is known about it: the value on the wires between nodes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .catalog import BUNDLED
from .checkpoints import FileInfo, inspect_file, load
from .checkpoints.errors import STAGE_TITLES, shown
from .float16 import float16_weights, overflows
from .memory_format import channels_last_convolutions
from .quantized import FORMATS, eight_bit_size

if TYPE_CHECKING:
    from .attachments import AppliedControl, AppliedIPAdapter
    from .reuse import InnerReuse

FIXED_FLOAT16 = "float16 (fixed weights)"
DTYPES = ("auto", "bfloat16", "float32", "float16", FIXED_FLOAT16, *FORMATS)

HostDtype = Callable[[str, int], "torch.dtype | None"]

# Smaller models run in float32 anywhere: it costs next to nothing.
_SMALL_PARAMETERS = 100_000_000


@dataclass(frozen=True, eq=False)
class StageHandle:
    """One loaded model. Immutable: nothing changes `module`, and `to` gives another handle.

    module: a model of `cascade_ops.models`, or a `TextEncoder`. info: what its file is. name: the file as the user
    knows it. runs_on: the device that the layers fetch their weights to when they run; None where the weights stay
    where they are. controls, ip_adapters: what steers a Stage C, see `attachments`; they stay where they are when the
    stage moves. reuse: what a Stage B does not compute in every step, see `reuse`; None is the exact run.
    acceleration: how it was asked to run faster, one of `acceleration.METHODS`; empty is not at all.
    weights: ``int8`` or ``float8`` where the large matrices are kept so, see `quantized`; else empty.
    """

    stage: str
    module: Any
    info: FileInfo
    name: str
    runs_on: torch.device | None = None
    controls: tuple[AppliedControl, ...] = ()
    ip_adapters: tuple[AppliedIPAdapter, ...] = ()
    reuse: InnerReuse | None = None
    acceleration: str = ""
    weights: str = ""

    @property
    def network(self) -> nn.Module:
        """The module itself, or the one inside a text encoder."""
        return self.module if isinstance(self.module, nn.Module) else self.module.module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.runs_on or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return getattr(self.module, "dtype", None) or next(self.network.parameters()).dtype

    @property
    def size_in_bytes(self) -> int:
        """Memory of the weights."""
        tensors = self.network.state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def title(self) -> str:
        """Stage, size and file in words: ``Stage C 1B lite (stage_c_lite.safetensors)``, ``Stage C tiny (bundled)``.

        A ControlNet's kind too, which is the size of the published ones, and that weights have 8 bits: ``Stage C 3.6B
        (stage_c.safetensors, int8 weights)``.
        """
        words, kind = self.info.title, self.info.control.get("kind", "").replace("_", " ")
        weights = f", {self.weights} weights" if self.weights else ""
        if kind and kind != self.info.size:
            words += f" {kind}"
        return f"{words} ({'bundled' if self.name == BUNDLED else self.name}{weights})"

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

    @property
    def attached(self) -> tuple[StageHandle, ...]:
        """The ControlNets and IP-Adapters that it carries and that have an effect, each once."""
        networks = [control.network for control in self.controls if control.strength]
        networks += [applied.adapter for applied in self.ip_adapters if applied.weight]
        return tuple({id(network): network for network in networks}.values())

    def with_attached(self, networks: Sequence[StageHandle]) -> StageHandle:
        """This stage with `networks` in place of those in `attached`, in their order: the same ones elsewhere."""
        moved = {id(old): new for old, new in zip(self.attached, networks, strict=True)}
        controls = (replace(each, network=moved.get(id(each.network), each.network)) for each in self.controls)
        adapters = (replace(each, adapter=moved.get(id(each.adapter), each.adapter)) for each in self.ip_adapters)
        return replace(self, controls=tuple(controls), ip_adapters=tuple(adapters))

    def expect(self, stage: str) -> StageHandle:
        """This handle; ValueError where it is another stage."""
        if self.stage != stage:
            wanted = STAGE_TITLES[stage]
            article = "an" if wanted[0].lower() in "aeiou" else "a"
            raise ValueError(
                f"{self.title} was given where {article} {wanted} is read: connect the loader of that stage."
            )
        return self


def _copied(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with all weights and buffers on `device`; the original keeps its own."""
    moved: dict[int, object] = {}
    for parameter in module.parameters():
        moved[id(parameter)] = nn.Parameter(parameter.to(device), requires_grad=False)
    for buffer in module.buffers():
        moved[id(buffer)] = buffer.to(device)
    # deepcopy takes what the memo already holds instead of copying it.
    copied = copy.deepcopy(module, moved)
    return channels_last_convolutions(copied) if device.type == "cuda" else copied


def load_stage(
    path: str | Path,
    stage: str,
    *,
    dtype: str = "auto",
    run_on: torch.device | str = "cpu",
    resident: bool | Callable[[int], bool] = False,
    name: str | None = None,
    host_dtype: HostDtype | None = None,
) -> StageHandle:
    """Load the `stage` that a file is or holds.

    dtype: one of DTYPES, see `choose_dtype`. run_on: the device it will run on. resident: put the weights there (a
    function is asked, with their bytes); else they wait in main memory. name: what to call the file in messages.
    host_dtype: what a host's settings make of ``auto`` for a stage of so many weights; None where they say nothing.

    Raises ValueError (CheckpointError) for a file that is something else or cannot be read, and for float16 where a
    weight is not finite in it.
    """
    path = Path(path)
    info = inspect_file(path).component(stage)
    device = torch.empty(0, device=run_on).device
    wanted = host_dtype(stage, info.parameters) if host_dtype and dtype in ("auto", *FORMATS) else None
    chosen = choose_dtype(dtype, info, device, wanted)
    eight_bits = FORMATS.get(dtype)
    size = eight_bit_size(info, chosen) if eight_bits else info.parameters * chosen.itemsize
    stays = resident(size) if callable(resident) else resident
    convert = None
    if chosen == torch.float16 and stage in ("stage_c", "stage_b"):
        convert = float16_weights(info, rescale=dtype == "float16" and overflows(info))
    place = device if stays else "cpu"
    module, info = load(info, stage, dtype=chosen, device=place, convert=convert, eight_bits=eight_bits)
    if stays and device.type == "cuda" and isinstance(module, nn.Module):
        channels_last_convolutions(module)
    weights = dtype.removesuffix(" weights") if eight_bits else ""
    return StageHandle(stage, module, replace(info, recipes={}), name or shown(path), weights=weights)


def choose_dtype(dtype: str, info: FileInfo, device: torch.device, wanted: torch.dtype | None = None) -> torch.dtype:
    """The dtype to run a model in.

    ``auto`` is float32 for small models (below 100 M parameters) and where there is no fast bfloat16 (CPU, older
    GPUs), and bfloat16 on GPUs that have it. On a CPU whose main memory is less than twice the float32 weights, it is
    bfloat16 too: slow, but it fits. `wanted`, a host's setting, comes before the rules for devices, but not float16 for
    a full-size Stage C: rescaled for it (see `float16`), it is no model for the host's own nodes any more.

    ``float16`` rescales a full-size Stage C; ``float16 (fixed weights)`` is for files that were rescaled before.
    Weights of 8 bits become what ``auto`` says when they are used.

    Raises ValueError for an unknown name.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    if dtype != "auto" and dtype not in FORMATS:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(dtype, torch.float16)
    if info.parameters < _SMALL_PARAMETERS:
        return torch.float32
    if wanted is not None and not (wanted == torch.float16 and overflows(info)):
        return wanted
    if device.type == "cuda":
        # Older GPUs only emulate bfloat16.
        fast = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if fast else torch.float32
    memory = _main_memory()
    size = info.parameters * 4 if dtype == "auto" else eight_bit_size(info, torch.float32)
    tight = device.type == "cpu" and memory is not None and size > memory / 2
    return torch.bfloat16 if tight else torch.float32


def _main_memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
