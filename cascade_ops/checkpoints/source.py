"""From a path to tensors: a single file, a shard, an index, or a diffusers or transformers folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, shown
from .header import Entry, read_header

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp32", ".bf16", ".fp16")
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


@dataclass(frozen=True)
class Source:
    """The tensors under one path: ``path`` as given, merged headers, and the ``config.json`` beside them, if any."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    file_bytes: int
    config_json: dict | None


def open_source(path: str | Path) -> Source:
    """Read the headers of whatever lies at ``path``.

    Raises:
        CheckpointError: nothing there, no safetensors file in the folder, or a file that is not sound.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, expected a safetensors file or a model folder: check the path.")
    files = _files(path)
    headers = [read_header(file) for file in files]
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for header in headers:
        tensors.update(header.tensors)
        metadata.update(header.metadata)
    folder = path if path.is_dir() else path.parent
    return Source(path, tensors, metadata, sum(header.file_bytes for header in headers), _config_json(folder))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        path = _weights_in(path)
    if path.name.endswith(".json"):
        return _shards(path)
    if _SHARD.search(path.name):
        for index in sorted(path.parent.glob("*.json")):
            if ".safetensors.index" in index.name and path in (shards := _shards(index)):
                return shards
    return [path]


def _weights_in(folder: Path) -> Path:
    for stem in _STEMS:
        for variant in _VARIANTS:
            names = (
                f"{stem}{variant}.safetensors",
                f"{stem}{variant}.safetensors.index.json",
                f"{stem}.safetensors.index{variant}.json",
            )
            for name in names:
                if (folder / name).is_file():
                    return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        examples = ", ".join(file.name for file in found[:4])
        raise CheckpointError(
            f"The folder {folder.name} holds {len(found)} safetensors files ({examples}) and none has a usual name, "
            "expected one model: give the path of the file itself."
        )
    parts = sorted(part.name for part in folder.iterdir() if part.is_dir() and any(part.glob("*.safetensors*")))
    if parts:
        raise CheckpointError(
            f"The folder {folder.name} holds a whole pipeline and not one model: "
            f"give one of its parts instead ({', '.join(parts)})."
        )
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLE_SUFFIXES:
            return file  # reading its header names the pickle and the way out
    raise CheckpointError(
        f"The folder {folder.name} holds no safetensors file, expected one model with its config.json: "
        "check the path or download the weights."
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{shown(index)} is not the index of a sharded model (no 'weight_map'), expected a safetensors file, "
            "an index or a model folder: choose the file with the weights."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{shown(index)} names {len(files)} files and '{missing[0]}' is not there ({len(missing)} missing): "
            "download the rest into the same folder."
        )
    return files


def _config_json(folder: Path) -> dict | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError:
        return None  # beside the file and not part of it: shapes say the rest
    return config if isinstance(config, dict) else None
