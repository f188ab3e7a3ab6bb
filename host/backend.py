"""The embedded host's answers to the nodes' seam (`nodes/runtime.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..cascade_ops.model_folders import find_model, list_models
from ..nodes.runtime import copied_to, drop_copies, room_for_good
from .folders import DataFolders
from .progress import ProgressBar, running_node

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..cascade_ops.handles import StageHandle


# The longest side, in pixels, of a preview in the editor; ComfyUI's default.
PREVIEW_SIZE = 512


class HostBackend:
    """Device, progress, interruption and folders of one embedded host."""

    def __init__(self, folders: DataFolders) -> None:
        self._folders = folders

    def device(self, stage: str) -> torch.device:
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def dtype(self, stage: str, parameters: int) -> torch.dtype | None:
        """These nodes' own rules."""

    def placed(self, handles: Sequence[StageHandle], memory: int) -> list[StageHandle]:
        return copied_to([self.device(handle.stage) for handle in handles], handles, memory)

    def make_room(self) -> None:
        drop_copies()

    def keep_on_device(self, stage: str, size: int) -> bool:
        return room_for_good(self.device(stage), size)

    def shows_previews(self) -> bool:
        return True

    def progress(self, total: int) -> HostProgress:
        return HostProgress(total)

    def check_interrupted(self) -> None:
        node = running_node()
        if node is not None:
            node.progress.check_interrupted()

    def model_files(self, folder: str) -> list[str]:
        return list_models(self._folders.models, folder)

    def model_path(self, folder: str, name: str) -> str:
        return find_model(self._folders.models, folder, name)

    def model_directory(self, folder: str) -> str:
        return str(self._folders.models[0] / folder)

    def output_directory(self) -> str:
        return str(self._folders.output)

    def input_directory(self) -> str:
        return str(self._folders.input)

    def temp_directory(self) -> str:
        return str(self._folders.temp)


class HostProgress:
    """A bar for the running node."""

    def __init__(self, total: int) -> None:
        self._bar = ProgressBar(total)

    def update(self, value: int, preview: Image.Image | None = None) -> None:
        # The editor draws previews at their own size, and Stage C's are small.
        picture = None if preview is None else ("JPEG", preview, PREVIEW_SIZE)
        self._bar.update_absolute(value, preview=picture)
