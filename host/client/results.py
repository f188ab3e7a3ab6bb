"""What a job made, and where on this machine it is saved."""

from __future__ import annotations

import itertools
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names that Windows takes for devices, whatever their suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
_LONGEST_NAME = 200  # bytes; file systems take 255


@dataclass(frozen=True)
class ServerFile:
    """A file on the server, in its folder `type` ("output", "temp" or "input"). `node` made it; empty for an upload."""

    filename: str
    subfolder: str = ""
    type: str = "output"
    node: str = ""
    kind: str = "images"

    @property
    def value(self) -> str:
        """What an input of `LoadImage` takes to load this file."""
        path = f"{self.subfolder}/{self.filename}" if self.subfolder else self.filename
        return path if self.type == "input" else f"{path} [{self.type}]"

    def query(self) -> dict[str, str]:
        """The parameters of `GET /view`."""
        return {"filename": self.filename, "subfolder": self.subfolder, "type": self.type}


@dataclass(frozen=True)
class Result:
    """`outputs`: what each node shows or has saved, as the server puts it."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]

    @property
    def files(self) -> list[ServerFile]:
        """All files that the job made, in the server's order."""
        return [
            ServerFile(entry["filename"], _text(entry, "subfolder"), _text(entry, "type") or "output", node, kind)
            for node, shown in self.outputs.items()
            if isinstance(shown, dict)
            for kind, entries in shown.items()
            if isinstance(entries, list)
            for entry in entries
            if isinstance(entry, dict) and isinstance(entry.get("filename"), str)
        ]

    @property
    def images(self) -> list[ServerFile]:
        """The files that are pictures."""
        return [file for file in self.files if file.kind == "images"]

    @property
    def kept(self) -> list[ServerFile]:
        """The files that were saved for good; where there are none, the temporary ones."""
        files = self.files
        return [file for file in files if file.type == "output"] or files


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def safe_path(folder: Path, file: ServerFile) -> Path:
    """Where `file` belongs below `folder`: its sub-folders and its name, with all that could lead elsewhere taken out.

    ValueError where a link that lies in `folder` would lead out of it.
    """
    parts = [_safe_name(part) for part in re.split(r"[/\\]", file.subfolder)]
    name = _safe_name(re.split(r"[/\\]", file.filename)[-1]) or "file"
    target = folder.joinpath(*parts, name)
    root = os.path.realpath(folder)
    parent = os.path.realpath(target.parent)
    if os.path.commonpath([root, parent]) != root:
        raise ValueError(f"{target.parent} leads out of {folder}; remove that link or save to another folder")
    return target


def _safe_name(name: str) -> str:
    # No leading dot: a name must not hide the file, nor make it one that other programs read as settings.
    name = _UNSAFE.sub("_", name).strip(" .")
    if _DEVICES.match(name):
        name = f"_{name}"
    stem, suffix = os.path.splitext(name)
    suffix = suffix[:20]
    while len((stem + suffix).encode()) > _LONGEST_NAME:
        stem = stem[:-1]
    return stem + suffix


class Download:
    """A file in the making, beside `target`; it is gone again unless `keep` is called before the block ends."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = target.parent / f".{secrets.token_hex(8)}.part"

    def __enter__(self) -> Download:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "xb")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def keep(self) -> Path:
        """Give the complete file its name and return its path.

        A file that is there stays: the same bytes are not saved twice, others go to `name (1).png` and so on.
        """
        self._file.close()
        return next(path for path in _candidates(self._target) if _take(self._temporary, path))


def _take(temporary: Path, candidate: Path) -> bool:
    """Give the file the name `candidate`, unless another file has it."""
    if not os.path.lexists(candidate):
        try:
            # Unlike a renaming, this never replaces a file that appeared meanwhile.
            os.link(temporary, candidate)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            os.replace(temporary, candidate)
        return True
    return candidate.is_file() and _same(temporary, candidate)


def _same(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        while chunk := first.read(1 << 20):
            if chunk != second.read(1 << 20):
                return False
    return True


def _candidates(target: Path) -> Iterator[Path]:
    yield target
    for number in itertools.count(1):
        yield target.with_name(f"{target.stem} ({number}){target.suffix}")
