"""Read what a safetensors file says about itself, without reading a tensor.

The format (https://huggingface.co/docs/safetensors): eight bytes with the little-endian length N of the
header, N bytes of JSON that map each tensor name to ``dtype``, ``shape`` and ``data_offsets`` (relative to
the end of the header), then the tensors' bytes without gaps. ``__metadata__`` maps strings to strings.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, shown

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: ``dtype`` in the format's words, bytes ``start`` to ``end`` from the file's beginning."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Everything that a file's header says."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: not a safetensors file (a pickle, a web page, a Git LFS pointer, GGUF, ...), a broken
            header, or a file shorter or longer than its header promises.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise CheckpointError(_not_safetensors(path, start))
        if length > file_bytes - 8:
            raise CheckpointError(_truncated(path, file_bytes, f"its header alone takes {8 + length:,}"))
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(
            f"{shown(path)} has a header that is not valid JSON, where a safetensors header was expected: "
            "the file is damaged, download or save it again."
        ) from error
    return _checked(path, header, 8 + length, file_bytes)


def _checked(path: Path, header: dict, data_start: int, file_bytes: int) -> Header:
    metadata = header.pop("__metadata__", None) or {}
    entries: dict[str, Entry] = {}
    for name, item in header.items():
        try:
            dtype, shape = item["dtype"], tuple(item["shape"])
            begin, end = item["data_offsets"]
            size = math.prod(shape) * ITEM_BYTES[dtype]
        except (KeyError, TypeError, ValueError) as error:
            found = item.get("dtype") if isinstance(item, dict) else None
            raise CheckpointError(
                f"{shown(path)} describes the tensor '{name}' in a way that is not understood "
                f"(dtype {found!r}), expected a dtype such as F32 or BF16, a shape and two offsets: "
                "save the file again with safetensors."
            ) from error
        if end - begin != size or begin < 0:
            raise CheckpointError(
                f"{shown(path)} gives the tensor '{name}' {end - begin:,} bytes where {dtype} {list(shape)} takes "
                f"{size:,}: the header is damaged, download or save the file again."
            )
        entries[name] = Entry(path, name, dtype, shape, data_start + begin, data_start + end)
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise CheckpointError(
                f"{shown(path)} leaves a gap or an overlap before the tensor '{entry.name}' where safetensors "
                "stores tensors back to back: the header is damaged, download or save the file again."
            )
        position = entry.end
    if position > file_bytes:
        raise CheckpointError(_truncated(path, file_bytes, f"its header promises {position:,}"))
    if position < file_bytes:
        raise CheckpointError(
            f"{shown(path)} has {file_bytes:,} bytes where its header describes {position:,}: "
            "the file was overwritten or joined with another, download it again."
        )
    return Header(path, entries, metadata, file_bytes)


def _truncated(path: Path, file_bytes: int, promise: str) -> str:
    return (
        f"{shown(path)} is cut short: it has {file_bytes:,} bytes and {promise}: download or copy it again to the end."
    )


def _not_safetensors(path: Path, start: bytes) -> str:
    """Name what the first bytes of a file that is not safetensors look like."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return f"{shown(path)} is empty, expected a safetensors file: download it again."
    if _is_pickle(start):
        return (
            f"{shown(path)} is a PyTorch pickle, which can run code when it is opened, expected safetensors: "
            "if you trust its source, open it with torch (weights_only=True) and write it with "
            "safetensors.torch.save_file, the lines are in docs/checkpoints.md under 'Converting a pickle'."
        )
    if text.startswith(b"version https://git-lfs"):
        return (
            f"{shown(path)} is a Git LFS pointer and not the weights, expected safetensors: "
            "run `git lfs pull` in that folder or download the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            f"{shown(path)} is a web page that was saved in place of the weights, expected safetensors: "
            "download the file again with the link to the file itself (log in where the licence asks for it)."
        )
    if start.startswith(b"GGUF"):
        return f"{shown(path)} is a GGUF file, expected safetensors: get the safetensors version of the model."
    return (
        f"{shown(path)} begins with {start[:8]!r} and is not a safetensors file, which is what was expected: "
        "choose another file or download it again."
    )


def _is_pickle(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a torch zip archive or of a pickle with protocol 2 to 5."""
    return start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and 2 <= int.from_bytes(start[1:2], "little") <= 5)
