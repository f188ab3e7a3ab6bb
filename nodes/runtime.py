"""The one seam between the nodes and whatever runs them.

Nodes call the functions of this module and import nothing of a host. Who answers is decided at each call:

1. the backend of the host that is running the node (the embedded host sets it, see `using` and `use`);
2. ComfyUI, where it has been imported in this process;
3. plain Python: CPU or CUDA, no progress report, models under `./models` and `CASCADE_MODELS`.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..cascade_ops.model_folders import MODEL_FOLDERS, find_model, list_models, roots_from_environment
from .runtime_comfyui import ComfyUIBackend

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = [
    "MODEL_FOLDERS",
    "Backend",
    "Progress",
    "check_interrupted",
    "device",
    "free_memory",
    "input_directory",
    "model_files",
    "model_path",
    "output_directory",
    "progress",
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

    def device(self) -> torch.device: ...
    def progress(self, total: int) -> Progress: ...
    def check_interrupted(self) -> None: ...
    def model_files(self, folder: str) -> list[str]: ...
    def model_path(self, folder: str, name: str) -> str: ...
    def output_directory(self) -> str: ...
    def input_directory(self) -> str: ...
    def temp_directory(self) -> str: ...
    def free_memory(self, size: int) -> None: ...


def device() -> torch.device:
    """The device that models run on."""
    return _backend().device()


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


def output_directory() -> str:
    """Where finished pictures and files go."""
    return _backend().output_directory()


def input_directory() -> str:
    """Where pictures that the user brought lie."""
    return _backend().input_directory()


def temp_directory() -> str:
    """Where previews go; the host may empty it."""
    return _backend().temp_directory()


def free_memory(size: int) -> None:
    """Make room for `size` bytes on the device, as far as the host can."""
    _backend().free_memory(size)


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

    def device(self) -> torch.device:
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def progress(self, total: int) -> Progress:
        return _SilentProgress()

    def check_interrupted(self) -> None:
        """Nothing to check: Ctrl-C raises KeyboardInterrupt by itself."""

    def model_files(self, folder: str) -> list[str]:
        return list_models(self._roots(), folder)

    def model_path(self, folder: str, name: str) -> str:
        return find_model(self._roots(), folder, name)

    def output_directory(self) -> str:
        return str(Path("output").absolute())

    def input_directory(self) -> str:
        return str(Path("input").absolute())

    def temp_directory(self) -> str:
        return str(Path("temp").absolute())

    def free_memory(self, size: int) -> None:
        release_unused_memory()

    @staticmethod
    def _roots() -> list[Path]:
        return [Path("models").absolute(), *roots_from_environment()]


class _SilentProgress:
    def update(self, value: int, preview: Image.Image | None = None) -> None:
        """No host, no report."""


def release_unused_memory() -> None:
    """Collect garbage and hand the memory that PyTorch holds in reserve back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_plain = PlainBackend()
_comfyui = ComfyUIBackend()
_installed: Backend | None = None
_current: ContextVar[Backend | None] = ContextVar("cascade_backend", default=None)


def _backend() -> Backend:
    backend = _current.get() or _installed
    if backend is not None:
        return backend
    if "folder_paths" in sys.modules and "comfy.model_management" in sys.modules:
        return _comfyui
    return _plain
