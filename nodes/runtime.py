"""The one seam between the nodes and whatever runs them.

Nodes call the functions of this module and import nothing of a host. Who answers is decided at each call:

1. the backend of the host that is running the node (the embedded host sets it, see `using` and `use`);
2. ComfyUI, where it has been imported in this process;
3. plain Python: CPU or CUDA, no progress report, models under `./models` and `CASCADE_MODELS`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..cascade_ops.model_folders import MODEL_FOLDERS, find_model, list_models, roots_from_environment
from .runtime_comfyui import ComfyUIBackend

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..cascade_ops.handles import StageHandle

__all__ = [
    "MODEL_FOLDERS",
    "Backend",
    "Progress",
    "check_interrupted",
    "device",
    "dtype",
    "in_comfyui",
    "input_directory",
    "keep_on_device",
    "make_room",
    "model_directory",
    "model_files",
    "model_path",
    "output_directory",
    "placed",
    "progress",
    "shows_previews",
    "temp_directory",
    "use",
    "using",
]


class Progress(Protocol):
    """Reports how far a loop is."""

    def update(self, value: int, preview: Image.Image | None = None) -> None:
        """Report that `value` of the total steps are done (a count from 0, not an increment).

        Raises the host's own interruption exception where the user stopped the run.
        """


class Backend(Protocol):
    """What a host provides. All paths are strings; `folder` is one of `MODEL_FOLDERS`."""

    def device(self, stage: str) -> torch.device: ...
    def dtype(self, stage: str, parameters: int) -> torch.dtype | None: ...
    def placed(self, handles: Sequence[StageHandle], memory: int) -> list[StageHandle]: ...
    def make_room(self) -> None: ...
    def keep_on_device(self, stage: str, size: int) -> bool: ...
    def shows_previews(self) -> bool: ...
    def progress(self, total: int) -> Progress: ...
    def check_interrupted(self) -> None: ...
    def model_files(self, folder: str) -> list[str]: ...
    def model_path(self, folder: str, name: str) -> str: ...
    def model_directory(self, folder: str) -> str: ...
    def output_directory(self) -> str: ...
    def input_directory(self) -> str: ...
    def temp_directory(self) -> str: ...


def in_comfyui() -> bool:
    """Whether ComfyUI has been imported in this process."""
    return "folder_paths" in sys.modules and "comfy.model_management" in sys.modules


def device(stage: str = "stage_c") -> torch.device:
    """The device that a stage runs on."""
    return _backend().device(stage)


def dtype(stage: str, parameters: int) -> torch.dtype | None:
    """What the host's settings say a stage of so many weights runs in; None where they leave it to these nodes."""
    return _backend().dtype(stage, parameters)


def placed(handles: Sequence[StageHandle], memory: int = 0) -> list[StageHandle]:
    """The stages, ready to run on the device, with `memory` bytes beside the weights to run in as far as there are.

    All that a node runs is placed in one call: a later one may take the place of what an earlier one placed. What comes
    back is for this run; nothing that is on a wire changes. Loaders leave weights in main memory, and here is decided
    how they get to the device: ComfyUI loads and offloads them by its own rules, other hosts give the node a copy that
    they keep while there is room, or stream the weights where there is not (`cascade_ops.residency`).
    What a stage carries (ControlNets, IP-Adapters) is placed with it.
    """
    carried = {id(each): each for handle in handles for each in handle.attached}
    ready = _backend().placed([*handles, *carried.values()], memory)
    moved = dict(zip(carried, ready[len(handles) :], strict=True))
    return [
        now.with_attached([moved[id(each)] for each in handle.attached]) if handle.attached else now
        for handle, now in zip(handles, ready, strict=False)
    ]


def make_room() -> None:
    """Let the host take what it keeps on the device off it, for work that wants all of its memory, such as training."""
    _backend().make_room()


def keep_on_device(stage: str, size: int) -> bool:
    """Whether a loader puts a stage of `size` bytes on the device for good, with no copy of it in main memory."""
    return _backend().keep_on_device(stage, size)


def shows_previews() -> bool:
    """Whether to show a picture while sampling where nobody connected a model to make one with."""
    return _backend().shows_previews()


def progress(total: int) -> Progress:
    """A progress bar of `total` steps for the running node."""
    return _backend().progress(total)


def check_interrupted() -> None:
    """Raise the host's interruption exception where the user stopped the run; call it in every long loop."""
    _backend().check_interrupted()


def model_files(folder: str) -> list[str]:
    """Sorted names of the model files of one kind; empty where there are none."""
    return _backend().model_files(folder)


def model_path(folder: str, name: str) -> str:
    """Full path of a model file; ValueError that names the places looked at where there is none."""
    return _backend().model_path(folder, name)


def model_directory(folder: str) -> str:
    """Where new model files of one kind go; it may not be there yet."""
    return _backend().model_directory(folder)


def output_directory() -> str:
    """Where finished pictures and files go."""
    return _backend().output_directory()


def input_directory() -> str:
    """Where pictures that the user brought lie."""
    return _backend().input_directory()


def temp_directory() -> str:
    """Where previews go; the host may empty it."""
    return _backend().temp_directory()


def use(backend: Backend | None) -> None:
    """Let `backend` answer in this process from now on; None goes back to ComfyUI or plain Python."""
    global _installed
    _installed = backend


@contextlib.contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Let `backend` answer inside the block, in this thread only; it takes precedence over `use`."""
    token = _current.set(backend)
    try:
        yield
    finally:
        _current.reset(token)


class PlainBackend:
    """No host: nodes called from a Python program."""

    def device(self, stage: str) -> torch.device:
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def dtype(self, stage: str, parameters: int) -> torch.dtype | None:
        """The rules of `cascade_ops.handles.choose_dtype`."""

    def placed(self, handles: Sequence[StageHandle], memory: int) -> list[StageHandle]:
        return copied_to([self.device(handle.stage) for handle in handles], handles, memory)

    def make_room(self) -> None:
        drop_copies()

    def keep_on_device(self, stage: str, size: int) -> bool:
        return room_for_good(self.device(stage), size)

    def shows_previews(self) -> bool:
        return False

    def progress(self, total: int) -> Progress:
        return _SilentProgress()

    def check_interrupted(self) -> None:
        """Nothing to check: Ctrl-C raises KeyboardInterrupt by itself."""

    def model_files(self, folder: str) -> list[str]:
        return list_models(self._roots(), folder)

    def model_path(self, folder: str, name: str) -> str:
        return find_model(self._roots(), folder, name)

    def model_directory(self, folder: str) -> str:
        return str(self._roots()[0] / folder)

    def output_directory(self) -> str:
        return str(Path("output").absolute())

    def input_directory(self) -> str:
        return str(Path("input").absolute())

    def temp_directory(self) -> str:
        return str(Path("temp").absolute())

    @staticmethod
    def _roots() -> list[Path]:
        return [Path("models").absolute(), *roots_from_environment()]


class _SilentProgress:
    def update(self, value: int, preview: Image.Image | None = None) -> None:
        """No host, no report."""


def copied_to(devices: Sequence[torch.device], handles: Sequence[StageHandle], memory: int = 0) -> list[StageHandle]:
    """Each stage on its device: itself if it is there, else a copy, or one whose weights are streamed to it.

    Copies stay for the next run while all that is asked for fits, see `cascade_ops.residency`. On a CPU there is
    nothing to copy.
    """
    from ..cascade_ops.residency import DEVICE_KEEPER

    return DEVICE_KEEPER.placed(handles, devices, memory)


def drop_copies() -> None:
    """Take the copies that are kept on devices off them."""
    from ..cascade_ops.residency import DEVICE_KEEPER

    DEVICE_KEEPER.drop()


def room_for_good(device: torch.device, size: int) -> bool:
    """Whether a stage of `size` bytes may live on the device without a copy in main memory."""
    from ..cascade_ops.residency import DEVICE_KEEPER

    return DEVICE_KEEPER.fits_whole_family(device, size)


def release_unused_memory() -> None:
    """Collect garbage and hand the memory that PyTorch holds in reserve back to the device."""
    from ..cascade_ops.free_memory import release_unused

    release_unused()


_plain = PlainBackend()
_comfyui = ComfyUIBackend()
_installed: Backend | None = None
_current: ContextVar[Backend | None] = ContextVar("cascade_backend", default=None)


def _backend() -> Backend:
    backend = _current.get() or _installed
    if backend is not None:
        return backend
    return _comfyui if in_comfyui() else _plain
