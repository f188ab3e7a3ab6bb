"""Model folders on disk, for the hosts that are not ComfyUI.

A models root holds one sub-folder per kind (`diffusion_models`, `vae`, ...), the way ComfyUI lays them out. Names
are relative to that sub-folder and use `/` on every system, so that a workflow names a file the same way everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

MODEL_FOLDERS = (
    "diffusion_models",
    "checkpoints",
    "text_encoders",
    "vae",
    "clip_vision",
    "controlnet",
    "loras",
    "vae_approx",
    "embeddings",
)

# Folders that ComfyUI has no name for by itself, with the endings of what lies there. Packs that find faces share this.
OTHER_FOLDERS = {"insightface": (".onnx",)}

# Names that ComfyUI used before, still found in many installations.
FORMER_NAMES = {"diffusion_models": ("unet",), "text_encoders": ("clip",)}

# Pickles are listed too: a loader refuses them with the way to convert them, which helps more than not finding them.
MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


def roots_from_environment() -> list[Path]:
    """Models roots named in `CASCADE_MODELS` (several are separated as in `PATH`), in order."""
    return [Path(entry).expanduser() for entry in os.environ.get("CASCADE_MODELS", "").split(os.pathsep) if entry]


def list_models(roots: Iterable[Path], folder: str) -> list[str]:
    """Names of the model files of one kind under all `roots`, sorted, each once."""
    return list_files(_bases(roots, folder), OTHER_FOLDERS.get(folder, MODEL_SUFFIXES))


def list_files(bases: Iterable[Path], suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files with such endings in these folders and below, sorted, each once."""
    names: set[str] = set()
    for base in bases:
        for directory, subdirectories, files in os.walk(base, followlinks=True):
            # A link that points upwards must not make the walk endless.
            real = os.path.realpath(directory)
            subdirectories[:] = sorted(
                name
                for name in subdirectories
                if not name.startswith(".")
                and not _is_within(os.path.realpath(os.path.join(directory, name)), above=real)
            )
            names.update(
                Path(directory, name).relative_to(base).as_posix()
                for name in files
                if name.lower().endswith(suffixes)
                and not name.startswith(".")
                # Leaves out links whose file is gone, which would make `auto` fail.
                and os.path.isfile(os.path.join(directory, name))
            )
    return sorted(names)


def find_model(roots: Iterable[Path], folder: str, name: str) -> str:
    """Full path of the model file `name` of one kind; ValueError where there is none."""
    return find_file(_bases(roots, folder), folder, name)


def find_file(bases: Iterable[Path], folder: str, name: str) -> str:
    """Full path of the file `name` in the first of these folders that has it; ValueError where none does."""
    bases = list(bases)
    relative = Path(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{folder}: {name!r} is not a file name inside the model folder; name a file below {folder}/")
    for base in bases:
        candidate = base / relative
        if candidate.is_file():
            return str(candidate)
    former = FORMER_NAMES.get(folder, ())
    places = ", ".join(str(base) for base in bases if base.name not in former)
    raise ValueError(f"{folder}: no file named {name!r} was found; put it in {places} or choose another file")


def _bases(roots: Iterable[Path], folder: str) -> list[Path]:
    known = (*MODEL_FOLDERS, *OTHER_FOLDERS)
    if folder not in known:
        raise ValueError(f"{folder!r} is not a model folder; expected one of {', '.join(known)}")
    return [Path(root, name) for root in roots for name in (folder, *FORMER_NAMES.get(folder, ()))]


def _is_within(path: str, *, above: str) -> bool:
    """Whether `above` lies in `path`, that is, whether `path` is `above` or one of its parents."""
    return above == path or above.startswith(path.rstrip(os.sep) + os.sep)
