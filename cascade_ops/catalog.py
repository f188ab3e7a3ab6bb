"""Which model files there are for a stage, and which of them is the best: what `auto` means.

Files are recognised by their content (`checkpoints.inspect_file` reads the header), never by their name. What was
found is remembered by path, time and size. A file that cannot be read, or that holds something else, counts as none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .checkpoints import FileInfo

AUTO = "auto"
BUNDLED = "tiny (bundled)"

# ComfyUI's model folders that may hold a stage, in the order in which they are listed.
STAGE_FOLDERS = {
    "stage_c": ("diffusion_models", "checkpoints"),
    "stage_b": ("diffusion_models", "checkpoints"),
    "stage_a": ("vae", "checkpoints"),
    "text_encoder": ("text_encoders", "checkpoints"),
    "previewer": ("vae_approx", "vae", "checkpoints"),
    "latent_encoder": ("vae", "checkpoints"),
    "image_encoder": ("clip_vision", "checkpoints"),
    "controlnet": ("controlnet",),
    # ComfyUI has no folder for these.
    "ip_adapter": ("controlnet",),
    "lora": ("loras",),
}

# As in control.CONTROL_KINDS, which is not imported here because it needs PyTorch.
CONTROL_KINDS = ("canny", "inpainting", "super_resolution", "identity")

_SUFFIXES = (".safetensors", ".sft")
_BUNDLED_FOLDER = Path(__file__).parents[1] / "tiny" / "weights"


class ModelFile(NamedTuple):
    """A file as a list shows it and where it lies."""

    name: str
    path: str


FilesOf = Callable[[str], Sequence[ModelFile]]  # the user's files that may hold a stage, bundled ones not included


def bundled(stage: str, kind: str = "") -> ModelFile:
    """The file of the tiny family that comes with this package; `kind` says which of its ControlNets."""
    name = f"{stage}_{kind}" if kind else stage
    return ModelFile(BUNDLED, str(_BUNDLED_FOLDER / f"{name}.safetensors"))


def fingerprint(path: str) -> str:
    """Changes when the file does: a hash of path, time of change and size; ``missing`` where it is not there.

    ComfyUI writes what ``IS_CHANGED`` answers into every picture that it saves, where a path would tell of its user.
    """
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return hashlib.sha256(f"{path}: {status.st_mtime_ns} {status.st_size}".encode()).hexdigest()


def recognise(path: str) -> FileInfo | None:
    """What the file is, or None where it cannot be read; the tensor list is left out, since it is remembered."""
    stamp = fingerprint(path)
    if path not in _known or _known[path][0] != stamp:
        _known[path] = (stamp, _inspect(path))
    return _known[path][1]


_known: dict[str, tuple[str, FileInfo | None]] = {}


def _inspect(path: str) -> FileInfo | None:
    from .checkpoints import inspect_file

    try:
        info = inspect_file(path)
    except (ValueError, OSError):
        return None
    components = tuple(replace(part, recipes={}) for part in info.components)
    return replace(info, recipes={}, components=components)


def part_of(path: str, stage: str) -> FileInfo | None:
    """The `stage` that the file is or holds, where it can be loaded; else None."""
    info = recognise(path) if path.lower().endswith(_SUFFIXES) else None
    if info is None:
        return None
    parts = [part for part in info.components or (info,) if part.stage == stage]
    if len(parts) != 1 or parts[0].unknown or parts[0].leftover:
        return None
    return parts[0]


def best(stage: str, files_of: FilesOf, kind: str = "") -> ModelFile:
    """The file that `auto` takes: published full size, then lite, then other sizes, then the bundled tiny one.

    Among files of one size, whole floats come before 8-bit ones, more parameters before fewer, and then the order of
    the list counts. What works with a Stage C must be one that fits the Stage C that `auto` takes: a folder usually
    holds CLIP models of other families too. kind: of control, for a ControlNet.
    """
    parts = [(file, part_of(file.path, stage)) for file in files_of(stage)]
    found = [(file, part) for file, part in parts if part is not None]
    if kind:
        found = [(file, part) for file, part in found if part.control.get("kind") == kind]
    if stage in _FITS and found:
        stage_c = part_of(best("stage_c", files_of).path, "stage_c")
        if stage_c is not None:
            found = [(file, part) for file, part in found if _FITS[stage](part, stage_c)]
    if not found:
        return bundled(stage, kind)
    return min(found, key=lambda pair: _order(pair[1]))[0]


def best_checkpoint(main: str, others: Iterable[str], files: Sequence[ModelFile]) -> ModelFile | None:
    """The best combined checkpoint that holds the stage `main` and all of `others`; None where there is none."""
    whole = [
        (file, part)
        for file in files
        if (part := part_of(file.path, main)) is not None
        and all(part_of(file.path, stage) is not None for stage in others)
    ]
    return min(whole, key=lambda pair: _order(pair[1]))[0] if whole else None


def _order(part: FileInfo) -> tuple[int, bool, int]:
    return part.rank, part.dtypes[:1] == ("fp8",), -part.parameters


def text_widths(part: FileInfo) -> tuple[int, int]:
    """Width of the hidden states and of the pooled text that a text encoder gives or a Stage C reads."""
    if part.stage == "text_encoder":
        return part.config["hidden_size"], part.config["projection_dim"]
    return part.config["c_clip_text"], part.config["c_clip_text_pooled"]


def _text_encoder_fits(part: FileInfo, stage_c: FileInfo) -> bool:
    return text_widths(part) == text_widths(stage_c)


def _image_encoder_fits(part: FileInfo, stage_c: FileInfo) -> bool:
    return part.config["projection_dim"] == stage_c.config["c_clip_img"]


def _controlnet_fits(part: FileInfo, stage_c: FileInfo) -> bool:
    blocks = sum(map(sum, stage_c.config["blocks"]))
    return part.config["c_proj"] in stage_c.config["c_hidden"] and max(part.config["proj_blocks"]) < blocks


def _ip_adapter_fits(part: FileInfo, stage_c: FileInfo) -> bool:
    return set(part.config["c_hidden_per_block"]) <= set(stage_c.config["c_hidden"])


_FITS: dict[str, Callable[[FileInfo, FileInfo], bool]] = {
    "text_encoder": _text_encoder_fits,
    "image_encoder": _image_encoder_fits,
    "controlnet": _controlnet_fits,
    "ip_adapter": _ip_adapter_fits,
}


def embedding_finder(files: Iterable[ModelFile]) -> Callable[[str], str | None]:
    """Finds the path of a textual-inversion file by its name in a prompt, with or without its suffix."""
    paths: dict[str, str] = {}
    for name, path in files:
        name = name.replace("\\", "/")
        paths.setdefault(name, path)
        paths.setdefault(name.rsplit(".", 1)[0], path)
    return lambda name: paths.get(name.replace("\\", "/"))
