"""The seam's answers inside ComfyUI. Its modules are looked up at each call and never imported at start."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

from ..cascade_ops.model_folders import FORMER_NAMES

if TYPE_CHECKING:
    import torch
    from PIL import Image

# The longest side, in pixels, of a preview picture that is sent to the browser.
PREVIEW_SIZE = 512


class ComfyUIBackend:
    """ComfyUI's device, memory, progress, interruption and folders; nothing in `folder_paths` is ever changed."""

    def device(self) -> torch.device:
        return _management().get_torch_device()

    def progress(self, total: int) -> ComfyUIProgress:
        return ComfyUIProgress(total)

    def check_interrupted(self) -> None:
        _management().throw_exception_if_processing_interrupted()

    def model_files(self, folder: str) -> list[str]:
        return list(_folder_paths().get_filename_list(_known_folder(folder)))

    def model_path(self, folder: str, name: str) -> str:
        folder_paths, known = _folder_paths(), _known_folder(folder)
        path = folder_paths.get_full_path(known, name)
        if path is None or not os.path.isfile(path):
            places = ", ".join(folder_paths.get_folder_paths(known))
            raise ValueError(
                f"{folder}: no file named {name!r} was found; put it in {places}, or choose another file "
                "(press R in ComfyUI to refresh the lists)"
            )
        return path

    def output_directory(self) -> str:
        return _folder_paths().get_output_directory()

    def input_directory(self) -> str:
        return _folder_paths().get_input_directory()

    def temp_directory(self) -> str:
        return _folder_paths().get_temp_directory()

    def free_memory(self, size: int) -> None:
        management = _management()
        management.free_memory(size, management.get_torch_device())
        management.soft_empty_cache()


class ComfyUIProgress:
    """ComfyUI's bar. Without its server the bar does not look for an interruption, so this does."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar = importlib.import_module("comfy.utils").ProgressBar(total)

    def update(self, value: int, preview: Image.Image | None = None) -> None:
        _management().throw_exception_if_processing_interrupted()
        picture = None if preview is None else ("JPEG", preview, PREVIEW_SIZE)
        self._bar.update_absolute(value, self._total, picture)


def _folder_paths() -> ModuleType:
    return importlib.import_module("folder_paths")


def _management() -> ModuleType:
    return importlib.import_module("comfy.model_management")


def _known_folder(folder: str) -> str:
    """`folder`, or the name that an older ComfyUI knows it by."""
    registered = _folder_paths().folder_names_and_paths
    return next((name for name in (folder, *FORMER_NAMES.get(folder, ())) if name in registered), folder)
