"""Which stages have their weights on a device, decided from what is free there.

Loaded stages wait in main memory. What a node runs gets a copy on the device, and the copy stays for the next run as
long as there is room for everything that is asked for. Where there is not, the copies used longest ago go first; where
one stage alone is too large, its blocks are streamed (`streaming`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .free_memory import free_bytes, gigabytes, release_unused
from .handles import StageHandle
from .models.unet import CascadeUNet
from .streaming import CudaLane, Lane, streamed, streaming_plan
from .streaming_plan import SMALL, least_bytes
from .text import TextEncoder

MODES = ("auto", "resident", "one stage", "streamed")
MODE_VARIABLE = "CASCADE_MEMORY"

# Left free beside all that is counted: work space of libraries, rounding of the allocator.
MARGIN = 400 * 2**20
# What the published stages take in bfloat16 with text encoder, Stage A and a Stage C that a LoRA changed (7 GB), and to
# run in; and what is left for running when a stage has gone there.
_COMFORTABLE_BYTES = 30 * 10**9
_RUNNING_BYTES = 4 * 10**9


def memory_mode(mode: str = "auto") -> str:
    """A name out of `MODES`; ``auto`` gives way to the environment variable ``CASCADE_MEMORY``.

    Raises ValueError for a name that is none of them.
    """
    source = ""
    if mode == "auto":
        mode, source = os.environ.get(MODE_VARIABLE) or "auto", f" in {MODE_VARIABLE}"
    mode = mode.replace("-", " ").replace("_", " ")
    if mode not in MODES:
        raise ValueError(f"The memory mode{source} is {mode!r}, expected one of {', '.join(MODES)}.")
    return mode


@dataclass
class _Kept:
    """A network on a device, its size and when it was used last."""

    network: nn.Module
    device: torch.device
    size: int
    used: int


class DeviceKeeper:
    """Keeps copies of stages on devices between runs.

    free: bytes that can be had on a device, None where nobody knows; there nothing is kept. lane: makes what streams to
    a device. margin: bytes to leave free. small: tensors of fewer bytes are not streamed. A copy lives no longer than
    the network that it was made from.
    """

    def __init__(
        self,
        free: Callable[[torch.device], int | None] = free_bytes,
        lane: Callable[[torch.device], Lane] = CudaLane,
        margin: int = MARGIN,
        small: int = SMALL,
    ) -> None:
        self._free, self._lane, self._margin, self._small = free, lane, margin, small
        # No value may refer to its key, or neither would ever be freed.
        self._kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
        self._clock = count()
        self._lock = threading.RLock()

    def placed(
        self, handles: Sequence[StageHandle], devices: Sequence[torch.device], memory: int = 0, mode: str = "auto"
    ) -> list[StageHandle]:
        """Each stage on its device, with `memory` bytes beside the weights to run in; for one run.

        A stage that is there already is returned as it is. mode: see `memory_mode`; ``one stage`` keeps nothing that is
        not asked for now, ``streamed`` streams Stage B and Stage C even where they fit, ``resident`` never does.

        Raises ValueError where a stage does not fit and cannot be streamed.
        """
        with self._lock:
            mode = memory_mode(mode)
            ready: dict[int, StageHandle] = {}
            for device in dict.fromkeys(devices):
                here = [each for each, wanted in zip(handles, devices, strict=True) if wanted == device]
                away = [handle for handle in here if handle.device != device]
                if away:
                    ready |= self._on(device, away, memory, mode)
            return [ready.get(id(handle), handle) for handle in handles]

    def drop(self, all_but: Sequence[nn.Module] = ()) -> None:
        """Take the copies off their devices, but those of some networks."""
        with self._lock:
            for network in list(self._kept):
                if network not in all_but:
                    del self._kept[network]
        release_unused()

    def kept_bytes(self, device: torch.device) -> int:
        """Bytes of the copies on a device."""
        return sum(kept.size for kept in self._kept.values() if kept.device == device)

    def fits_whole_family(self, device: torch.device, size: int) -> bool:
        """Whether a stage of `size` bytes may live on the device for good, without a copy in main memory.

        Only where there is room for all stages of the largest family and to run in: such a stage cannot be dropped.
        """
        free = self._free(device)
        mode = memory_mode()
        if device.type != "cuda" or mode in ("one stage", "streamed"):
            return False
        if mode == "resident":
            return True
        total = torch.cuda.get_device_properties(device).total_memory
        return total >= _COMFORTABLE_BYTES and (free or 0) >= size + _RUNNING_BYTES + self._margin

    def _on(
        self, device: torch.device, handles: Sequence[StageHandle], memory: int, mode: str
    ) -> dict[int, StageHandle]:
        wanted = [handle.network for handle in handles]
        for network in wanted:
            if network in self._kept and self._kept[network].device != device:
                del self._kept[network]
        if mode == "one stage":
            self.drop(all_but=wanted)
        large = _streamable(handles) if mode != "resident" else None
        if large is None or mode != "streamed":
            missing = {handle.network: handle.size_in_bytes for handle in handles if handle.network not in self._kept}
            fits = self._make_room(device, sum(missing.values()) + memory + self._margin, wanted)
            if fits or large is None:
                try:
                    return {id(handle): self._copy(handle, device) for handle in handles}
                except RuntimeError as error:
                    failure = error
                try:
                    # Whatever else is there goes; what was copied of this run's stages stays.
                    self.drop(all_but=wanted)
                    return {id(handle): self._copy(handle, device) for handle in handles}
                except RuntimeError as error:
                    failure = error
                if large is None:
                    self.drop()
                    raise _refusal(handles, device, self._free(device)) from failure
        return self._streaming(device, handles, large, memory)

    def _streaming(
        self, device: torch.device, handles: Sequence[StageHandle], large: StageHandle, memory: int
    ) -> dict[int, StageHandle]:
        """The largest one streamed, the others copied."""
        others = [handle for handle in handles if handle.network is not large.network]
        self.drop(all_but=[handle.network for handle in others])
        try:
            ready = {id(handle): self._copy(handle, device) for handle in others}
            free, least = self._free(device), least_bytes(large.module, self._small)
            budget = least
            if free is not None:
                # What a run is said to need is rounded up: where that alone is too much, as little as can be stays.
                budget = max(free - memory - self._margin, min(free - self._margin, least))
            network = streamed(large.module, self._lane(device), budget, self._small)
        except RuntimeError as error:
            self.drop()
            raise _refusal(handles, device, self._free(device)) from error
        except ValueError as error:
            self.drop()
            raise ValueError(f"{large.title} does not fit on {device}. {error}") from error
        running = replace(large, module=network, runs_on=device)
        return ready | {id(handle): running for handle in handles if handle.network is large.network}

    def _make_room(self, device: torch.device, needed: int, wanted: Sequence[nn.Module]) -> bool:
        """Whether `needed` bytes can be had; drops copies of others, those used longest ago first, until they can."""
        free = self._free(device)
        if free is None:
            # Nobody knows what fits: as much as can be is made free, and then it is tried.
            self.drop()
            return True
        if free < needed:
            release_unused()
        others = [(kept.used, network) for network, kept in self._kept.items() if kept.device == device]
        for _, network in sorted(others, key=lambda pair: pair[0]):
            if (self._free(device) or 0) >= needed:
                break
            if network not in wanted:
                del self._kept[network]
                release_unused()
        return (self._free(device) or 0) >= needed

    def _copy(self, handle: StageHandle, device: torch.device) -> StageHandle:
        kept = self._kept.get(handle.network)
        if kept is None:
            moved = handle.to(device)
            kept = _Kept(moved.network, device, handle.size_in_bytes, 0)
            if self._free(device) is not None:
                self._kept[handle.network] = kept
        kept.used = next(self._clock)
        if isinstance(handle.module, TextEncoder):
            return replace(handle, module=handle.module.with_module(kept.network))
        return replace(handle, module=kept.network)


def streaming_note(handle: StageHandle) -> list[str]:
    """What to say of a stage that is streamed; nothing of any other."""
    plan = streaming_plan(handle.network)
    return [] if plan is None else [plan.describe()]


def _streamable(handles: Sequence[StageHandle]) -> StageHandle | None:
    """The largest one that can be streamed."""
    found = [handle for handle in handles if isinstance(handle.network, CascadeUNet)]
    return max(found, key=lambda handle: handle.size_in_bytes, default=None)


def _refusal(handles: Sequence[StageHandle], device: torch.device, free: int | None) -> ValueError:
    names = " and ".join(handle.title for handle in handles)
    size = gigabytes(sum({handle.network: handle.size_in_bytes for handle in handles}.values()))
    there = "its memory could not be had" if free is None else f"{gigabytes(free)} of its memory are free"
    return ValueError(
        f"{names} could not be copied to {device}: {size} of weights were to go there and {there}. Close other "
        "programs that use the device, or choose smaller models; where it keeps failing, start anew."
    )


# Of this process; the plain and the embedded host both ask it.
DEVICE_KEEPER = DeviceKeeper()
