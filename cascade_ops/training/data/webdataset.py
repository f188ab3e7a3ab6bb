"""Pictures in tar files, in webdataset's convention: members of one sample share their name up to the first dot."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from .entries import Entry, Found, Problem, TarPlace, captions_of, file_stamp, size_of
from .pictures import SUFFIXES, PictureError, picture_size


def read_tars(path: Path, label: str) -> Found:
    """The pictures of a tar, or of all tars below a folder, in their order.

    The caption is the sample's ``.txt``, else ``caption``, ``text`` or ``captions`` of its ``.json``. Each tar's
    table of members is read once; the pictures stay where they are.

    Raises:
        ValueError: no tar there.
    """
    tars = [path] if path.is_file() else sorted(path.rglob("*.tar")) if path.is_dir() else []
    if not tars:
        raise ValueError(
            f"{path} is no tar and no folder with .tar files, expected webdataset tars (not compressed): correct the "
            "path of the source."
        )
    found = Found([], [])
    for tar in tars:
        name = tar.name if tar == path else tar.relative_to(path).as_posix()
        _read_tar(tar, label if tar == path else f"{label}/{name}", found)
    return found


def _read_tar(path: Path, label: str, found: Found) -> None:
    samples: dict[str, dict[str, TarPlace]] = {}
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} ends behind the end of the file")
                if member.isreg() and not member.issparse():
                    folder, _, last = member.name.rpartition("/")
                    key, _, kind = last.partition(".")
                    place = TarPlace(str(path), member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{key}".lstrip("./"), {}).setdefault(kind.lower(), place)
    except (tarfile.TarError, OSError, EOFError) as error:
        # What was listed before the damage is used.
        found.problems.append(Problem(label, f"the tar cannot be read to its end ({error})"))
    stamp = file_stamp(path) if samples else ""
    for key, members in samples.items():
        kinds = sorted(kind for kind in members if f".{kind}" in SUFFIXES)
        if kinds:
            _add(found, f"{label}/{key}.{kinds[0]}", members[kinds[0]], members, stamp)


def _add(found: Found, name: str, place: TarPlace, members: dict[str, TarPlace], stamp: str) -> None:
    try:
        values = _values(members)
        size = size_of(values)
        if size is None:
            with place.open() as file:
                size = picture_size(file)
    except PictureError as error:
        found.problems.append(Problem(name, str(error)))
        return
    captions = captions_of(values) or ("",)
    found.entries.append(Entry(name, place, f"{stamp}:{place.start}", *size, captions))


def _values(members: dict[str, TarPlace]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "json" in members:
        with members["json"].open() as file:
            try:
                values = json.loads(file.read().decode("utf-8-sig"))
            except ValueError as error:
                raise PictureError(f"its .json cannot be read ({error})") from error
        if not isinstance(values, dict):
            raise PictureError("its .json is no object")
    if "txt" in members:
        with members["txt"].open() as file:
            text = file.read().decode("utf-8-sig", errors="replace")
        values = {**values, "captions": [" ".join(text.split())]}
    return values
