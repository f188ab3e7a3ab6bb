"""A picture of a data set: where it lies, what is known about it, and how to open it."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .pictures import PictureError


class FilePlace(NamedTuple):
    """A file."""

    path: str

    def open(self) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise PictureError(error.strerror or "cannot be opened") from error

    def size(self) -> int:
        return os.path.getsize(self.path)


class TarPlace(NamedTuple):
    """A member of a tar: `length` bytes from `start`."""

    path: str
    start: int
    length: int

    def open(self) -> BinaryIO:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                return io.BytesIO(file.read(self.length))
        except OSError as error:
            raise PictureError(error.strerror or "the tar cannot be opened") from error

    def size(self) -> int:
        return self.length


class RowPlace(NamedTuple):
    """The picture of a row of a Hugging Face dataset on disk."""

    folder: str
    row: int

    def open(self) -> BinaryIO:
        from .huggingface import picture_bytes

        return io.BytesIO(picture_bytes(self.folder, self.row))

    def size(self) -> int:
        with self.open() as file:
            return file.seek(0, io.SEEK_END)


Place = FilePlace | TarPlace | RowPlace


@dataclass(frozen=True)
class Entry:
    """One picture.

    name: stable, for messages: the source's name and the place in it, with ``/``. place: None for a picture that is in
    memory. stamp: changes when the picture does. width, height: pixels as it is shown. captions: one is drawn per
    step; empty means the empty prompt. attributes: class indices by name, one for all captions or one per caption.
    maps: file of class maps. repeats, loss_weight: of its source.
    """

    name: str
    place: Place | None
    stamp: str
    width: int
    height: int
    captions: tuple[str, ...] = ("",)
    attributes: tuple[dict[str, int], ...] = ()
    maps: FilePlace | None = None
    repeats: int = 1
    loss_weight: float = 1.0


class Problem(NamedTuple):
    """A picture that is left out, and why."""

    name: str
    why: str


@dataclass
class Found:
    """What a source holds. left_out: pictures that its metadata does not list."""

    entries: list[Entry]
    problems: list[Problem]
    left_out: int = 0


def captions_of(values: dict[str, Any]) -> tuple[str, ...] | None:
    """The captions in a row of metadata: ``captions``, else ``text`` or ``caption``; None where it has none."""
    if isinstance(values.get("captions"), (list, tuple)) and values["captions"]:
        return tuple(str(text).strip() for text in values["captions"])
    for name in ("text", "caption"):
        if isinstance(values.get(name), str):
            return (values[name].strip(),)
    return None


def attributes_of(values: dict[str, Any], captions: int, where: str) -> tuple[dict[str, int], ...]:
    """``attributes`` of a row of metadata; ValueError for anything but whole numbers by name."""
    given = values.get("attributes")
    if given is None:
        return ()
    rows = given if isinstance(given, list) else [given]
    sound = len(rows) == captions or not isinstance(given, list)
    for row in rows:
        sound = sound and isinstance(row, dict) and all(type(value) is int for value in row.values())
    if not sound:
        raise ValueError(
            f"{where} has the attributes {str(given)[:60]}, expected whole numbers by name, or a list with one such "
            "table per caption: correct the row."
        )
    return tuple(dict(row) for row in rows)


def file_stamp(path: str | Path) -> str:
    """Changes with the file: its whole path, size and time of change."""
    status = os.stat(path)
    return f"{os.path.abspath(path)}:{status.st_size}:{status.st_mtime_ns}"


def size_of(values: dict[str, Any]) -> tuple[int, int] | None:
    """``width`` and ``height`` of a row of metadata, where both are given and positive."""
    width, height = values.get("width"), values.get("height")
    if type(width) is int and type(height) is int and width > 0 and height > 0:
        return width, height
    return None
