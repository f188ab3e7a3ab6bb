"""Encoded pictures and captions, kept on disk in a few files.

A store is a folder named after what it holds and everything that the results depend on but the picture itself: the
encoder and the preprocessing. In it lie shards, safetensors files of many rows; which picture or caption a row belongs
to stands in the metadata as a list of keys. So what was encoded with another encoder, at another size or from a
picture that has changed since is never found; its files stay until they are deleted by hand.

Values are float16: an error of at most 1/2048 of the value, or 2**-25 for values near zero, which is far below the
noise of training. A shard with values beyond float16's range is float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...checkpoints.errors import CheckpointError
from ...checkpoints.header import read_header
from ...checkpoints.reading import TORCH_DTYPES
from ...checkpoints.saving import write_tensors

Row = dict[str, Tensor]

_FORMAT = "1"
_SHARD_ROWS, _SHARD_BYTES = 256, 64 << 20
_ABANDONED = 24 * 3600  # seconds after which a partial file is taken for one that nobody writes any more


class Store(Protocol):
    """Rows of tensors by key."""

    def __contains__(self, key: str) -> bool: ...

    def add(self, keys: list[str], rows: list[Row]) -> None:
        """Take rows of equal shapes."""
        ...

    def read(self, key: str) -> Row:
        """The row, float32."""
        ...


class MemoryStore:
    """Rows in main memory, as they were given."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def add(self, keys: list[str], rows: list[Row]) -> None:
        self._rows.update(zip(keys, rows, strict=True))

    def read(self, key: str) -> Row:
        return self._rows[key]


class _Piece(NamedTuple):
    """One tensor of a shard: where its first row starts, and a row's bytes."""

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class DiskStore:
    """Rows in the shards of one folder; only what is asked for is read.

    A file appears under its name when it is complete, so that an interrupted run leaves whole shards behind and the
    next one goes on from them. Several processes may write at once. Files stay closed between reads, and the store
    can be pickled.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[tuple[str, dict[str, _Piece]]] = []
        self._rows: dict[str, tuple[int, int]] = {}
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            if not path.name.startswith("."):
                self._index(path)
        _remove_abandoned(folder)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, keys: list[str], rows: list[Row]) -> None:
        names = list(rows[0])
        stacked = {name: torch.stack([row[name] for row in rows]) for name in names}
        tensors = {}
        for name, tensor in stacked.items():
            dtype = _dtype_for(tensor)
            tensors[name] = (dtype, tuple(tensor.shape), lambda tensor=tensor, dtype=dtype: tensor.to(dtype))
        name = hashlib.blake2b("\n".join(keys).encode(), digest_size=10).hexdigest()
        path = self.folder / f"{name}.safetensors"
        write_tensors(path, tensors, {"cascade.cache": _FORMAT, "cascade.keys": json.dumps(keys)})
        self._index(path)

    def read(self, key: str) -> Row:
        shard, row = self._rows[key]
        path, pieces = self._shards[shard]
        values = {}
        with open(path, "rb") as file:
            for name, piece in pieces.items():
                file.seek(piece.start + row * piece.size)
                content = bytearray(file.read(piece.size))
                if len(content) < piece.size:
                    raise ValueError(
                        f"{path} has become shorter while it was in use, expected a whole cache file: delete it and "
                        "start again."
                    )
                values[name] = torch.frombuffer(content, dtype=piece.dtype).reshape(piece.shape).float()
        return values

    def _index(self, path: Path) -> None:
        """Take in a shard; one that is damaged counts as not there."""
        try:
            header = read_header(path)
            keys = json.loads(header.metadata["cascade.keys"])
        except (CheckpointError, OSError, KeyError, ValueError):
            return
        if header.metadata.get("cascade.cache") != _FORMAT:
            return
        pieces = {}
        for name, entry in header.tensors.items():
            shape = entry.shape[1:]
            size = (entry.end - entry.start) // max(1, entry.shape[0])
            pieces[name] = _Piece(entry.start, size, TORCH_DTYPES[entry.dtype], shape)
        self._shards.append((str(path), pieces))
        self._rows.update({key: (len(self._shards) - 1, row) for row, key in enumerate(keys)})


class ShardWriter:
    """Collects rows and hands them to a store in shards; a change of shapes starts a new one."""

    def __init__(self, store: Store):
        self._store, self._keys, self._rows = store, [], []

    def add(self, key: str, row: Row) -> None:
        shapes = {name: tensor.shape for name, tensor in row.items()}
        if self._rows and shapes != {name: tensor.shape for name, tensor in self._rows[0].items()}:
            self.flush()
        self._keys.append(key)
        self._rows.append(row)
        size = sum(tensor.numel() * 2 for tensor in row.values())
        if len(self._rows) >= _SHARD_ROWS or len(self._rows) * size >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._store.add(self._keys, self._rows)
        self._keys, self._rows = [], []


def key_of(*what: object) -> str:
    """A short key of everything that a row depends on beside its store."""
    return hashlib.blake2b(json.dumps(what, default=str).encode(), digest_size=16).hexdigest()


def store_folder(root: Path, kind: str, depends_on: Mapping[str, object]) -> Path:
    """The folder for results of one kind that depend on these encoders and settings."""
    return root / f"{kind}-{key_of(_FORMAT, sorted(depends_on.items()))[:16]}"


def missing(store: Store, keys: Iterable[str]) -> list[str]:
    """The keys that are not there, each once, in order."""
    return [key for key in dict.fromkeys(keys) if key not in store]


def _dtype_for(tensor: Tensor) -> torch.dtype:
    limit = torch.finfo(torch.float16).max
    fits = not tensor.numel() or bool((tensor.abs().amax() <= limit).item())
    return torch.float16 if fits else torch.float32


def _remove_abandoned(folder: Path) -> None:
    """Delete partial files that a killed run left behind long ago."""
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED:
                os.unlink(path)
        except OSError:
            continue
