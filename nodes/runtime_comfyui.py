"""The seam's answers inside ComfyUI. Its modules are looked up at each call and never imported at start."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..cascade_ops.model_folders import FORMER_NAMES, OTHER_FOLDERS, find_file, list_files

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..cascade_ops.handles import StageHandle


# Which of its settings says where a stage runs and where it waits; the others are diffusion models to it.
_PLACES = {
    "text_encoder": ("text_encoder_device", "text_encoder_offload_device"),
    "image_encoder": ("text_encoder_device", "text_encoder_offload_device"),
    "stage_a": ("vae_device", "vae_offload_device"),
    "latent_encoder": ("vae_device", "vae_offload_device"),
}


class ComfyUIBackend:
    """ComfyUI's device, memory, progress, interruption and folders; nothing in `folder_paths` is ever changed."""

    def device(self, stage: str) -> torch.device:
        return places(stage)[0]

    def dtype(self, stage: str, parameters: int) -> torch.dtype | None:
        import torch

        if stage not in ("stage_c", "stage_b"):
            return None
        device = self.device(stage)
        supported = [torch.bfloat16, torch.float32]
        chosen = _management().unet_dtype(device=device, model_params=parameters, supported_dtypes=supported)
        # float32 on a CPU is no choice of ComfyUI's; and nothing runs in the 8-bit floats that it stores weights in.
        if chosen == torch.float32 and device.type == "cpu":
            return None
        return chosen if chosen in (torch.bfloat16, torch.float16, torch.float32) else None

    def placed(self, handles: Sequence[StageHandle], memory: int) -> list[StageHandle]:
        from .comfyui_models import placed

        return placed(handles, memory)

    def make_room(self) -> None:
        management = _management()
        management.unload_all_models()
        management.soft_empty_cache()

    def keep_on_device(self, stage: str, size: int) -> bool:
        """Never: its own memory management moves the weights."""
        return False

    def shows_previews(self) -> bool:
        """As the setting says: of the server's start, or, since ComfyUI 0.8, of the prompt."""
        arguments = _arguments()
        return arguments.args.preview_method != arguments.LatentPreviewMethod.NoPreviews

    def progress(self, total: int) -> ComfyUIProgress:
        return ComfyUIProgress(total)

    def check_interrupted(self) -> None:
        _management().throw_exception_if_processing_interrupted()

    def model_files(self, folder: str) -> list[str]:
        if folder in OTHER_FOLDERS:
            return list_files(_other_places(folder), OTHER_FOLDERS[folder])
        return list(_folder_paths().get_filename_list(_known_folder(folder)))

    def model_path(self, folder: str, name: str) -> str:
        if folder in OTHER_FOLDERS:
            return find_file(_other_places(folder), folder, name)
        folder_paths, known = _folder_paths(), _known_folder(folder)
        path = folder_paths.get_full_path(known, name)
        if path is None or not os.path.isfile(path):
            places = ", ".join(folder_paths.get_folder_paths(known))
            raise ValueError(
                f"{folder}: no file named {name!r} was found; put it in {places}, or choose another file "
                "(press R in ComfyUI to refresh the lists)"
            )
        return path

    def model_directory(self, folder: str) -> str:
        if folder in OTHER_FOLDERS:
            return str(_other_places(folder)[0])
        return _folder_paths().get_folder_paths(_known_folder(folder))[0]

    def output_directory(self) -> str:
        return _folder_paths().get_output_directory()

    def input_directory(self) -> str:
        return _folder_paths().get_input_directory()

    def temp_directory(self) -> str:
        return _folder_paths().get_temp_directory()


class ComfyUIProgress:
    """ComfyUI's bar. Without its server the bar does not look for an interruption, so this does."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar = importlib.import_module("comfy.utils").ProgressBar(total)

    def update(self, value: int, preview: Image.Image | None = None) -> None:
        _management().throw_exception_if_processing_interrupted()
        picture = None if preview is None else ("JPEG", preview, _arguments().args.preview_size)
        self._bar.update_absolute(value, self._total, picture)


def places(stage: str) -> tuple[torch.device, torch.device]:
    """The devices that ComfyUI runs a stage on and keeps its weights on meanwhile."""
    run, wait = _PLACES.get(stage, ("get_torch_device", "unet_offload_device"))
    return getattr(_management(), run)(), getattr(_management(), wait)()


def _folder_paths() -> ModuleType:
    return importlib.import_module("folder_paths")


def _arguments() -> ModuleType:
    return importlib.import_module("comfy.cli_args")


def _management() -> ModuleType:
    return importlib.import_module("comfy.model_management")


def _other_places(folder: str) -> list[Path]:
    """Where files lie of a kind that ComfyUI has no name for: where another pack or its settings say, then its own."""
    paths = _folder_paths()
    named = paths.get_folder_paths(folder) if folder in paths.folder_names_and_paths else []
    return [Path(place) for place in dict.fromkeys([*named, os.path.join(paths.models_dir, folder)])]


def _known_folder(folder: str) -> str:
    """`folder`, or the name that an older ComfyUI knows it by."""
    registered = _folder_paths().folder_names_and_paths
    return next((name for name in (folder, *FORMER_NAMES.get(folder, ())) if name in registered), folder)
