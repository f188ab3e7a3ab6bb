"""Pictures in a folder, with captions beside them or in a ``metadata.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .entries import Entry, FilePlace, Found, Problem, attributes_of, captions_of, file_stamp, size_of
from .pictures import PictureError, is_picture, picture_size

METADATA = "metadata.jsonl"


def read_folder(root: Path, label: str) -> Found:
    """All pictures below a folder, in the order of their names.

    A picture's caption is the text file of its name (``dog.png``, ``dog.txt``). A ``metadata.jsonl`` speaks for its
    folder and those below: a JSON object per line with ``file_name`` (relative to it, Hugging Face's imagefolder
    convention) and ``text``, or ``captions``, a list; further ``maps`` (file of class maps), ``attributes`` and
    ``width``, ``height``, which save opening the picture. Pictures that it does not list are left out.

    Raises:
        ValueError: no such folder, or a line of metadata that cannot be read.
    """
    root = Path(os.path.abspath(root))  # one spelling of every path
    if not root.is_dir():
        raise ValueError(f"{root} is no folder, expected a folder with pictures: correct the path of the source.")
    found, listed = Found([], []), set()
    tables = [Path(folder) / METADATA for folder, _, files in _walk(root) if METADATA in files]
    for table in tables:
        listed |= _read_table(table, root, label, found)
    covered = tuple(str(table.parent) + os.sep for table in tables)
    for folder, _, files in _walk(root):
        for name in files:
            path = os.path.join(folder, name)
            if not is_picture(name) or path in listed:
                continue
            if path.startswith(covered):
                found.left_out += 1
            else:
                captions = _caption_beside(path)
                _add(found, label, root, path, {}, captions, FilePlace(path))
    found.entries.sort(key=lambda entry: entry.name)
    return found


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, folders, sorted(name for name in files if not name.startswith("."))


def _read_table(table: Path, root: Path, label: str, found: Found) -> set[str]:
    """Add the pictures of a metadata file; returns all files that it names."""
    named: set[str] = set()
    lines = table.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{table} line {number}"
        values = _parsed(line, where)
        path = _inside(table.parent, values["file_name"])
        if path is None:
            found.problems.append(Problem(f"{label}/{values['file_name']}", "a path that leads out of its folder"))
            continue
        if path in named:
            found.problems.append(Problem(f"{label}/{values['file_name']}", f"listed again in line {number}"))
            continue
        named.add(path)
        captions = captions_of(values) or _caption_beside(path)
        attributes = attributes_of(values, len(captions), where)
        maps = None
        if values.get("maps"):
            place = _inside(table.parent, str(values["maps"]))
            if place is None:
                raise ValueError(f"{where} names the maps {values['maps']!r}, expected a file below {table.parent}.")
            named.add(place)
            maps = FilePlace(place)
        _add(found, label, root, path, values, captions, FilePlace(path), attributes=attributes, maps=maps)
    return named


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}), expected one object per line: correct it.") from error
    if not isinstance(values, dict) or not isinstance(values.get("file_name"), str):
        raise ValueError(f"{where} has no file_name, expected an object with file_name and text: correct it.")
    return values


def _inside(folder: Path, name: str) -> str | None:
    """Path of a file that metadata names with ``/`` or, written on Windows, with ``\\``; None if it leads elsewhere."""
    windows = PureWindowsPath(name)
    parts = windows.parts if "\\" in name and not (folder / name).exists() else PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in parts:
        return None
    return os.path.join(folder, *parts)


def _caption_beside(path: str) -> tuple[str, ...]:
    try:
        text = Path(path).with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return ("",)
    return (" ".join(text.split()),)


def _add(
    found: Found,
    label: str,
    root: Path,
    path: str,
    values: dict[str, Any],
    captions: tuple[str, ...],
    place: FilePlace,
    **more: Any,
) -> None:
    name = f"{label}/{Path(path).relative_to(root).as_posix()}"
    try:
        size = size_of(values)
        if size is None:
            with place.open() as file:
                size = picture_size(file)
        stamp = file_stamp(path)
    except PictureError as error:
        found.problems.append(Problem(name, str(error)))
    except OSError as error:
        found.problems.append(Problem(name, error.strerror or "cannot be opened"))
    else:
        found.entries.append(Entry(name, place, stamp, *size, captions, **more))
