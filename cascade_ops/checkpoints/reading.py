"""Read tensors from safetensors files straight into memory of their own.

Bytes go from the file into the tensor that will hold them, fused q/k/v included, so that loading never holds a
second copy and no mapping keeps the file open afterwards (a mapped file counts as memory of the process, cannot be
replaced on Windows and crashes the process when it is truncated).
"""

from __future__ import annotations

import threading
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError, shown
from .header import Entry
from .layouts import Recipe

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class TensorReader:
    """Open files on first use and close them all at the end of a ``with`` block.

    Several threads may read at once: each has files, and with them places to read at, of its own.
    """

    def __init__(self) -> None:
        self._files: dict[tuple[int, Path], BinaryIO] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def read(self, recipe: Recipe, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor.

        Args:
            dtype: for float tensors; None keeps the file's, except that 8-bit floats, which no layer computes in,
                become bfloat16.
        """
        stored = _stored_dtype(recipe)
        raw = torch.empty(sum(piece.end - piece.start for piece in recipe.pieces), dtype=torch.uint8)
        buffer = raw.numpy().data
        position = 0
        for piece in recipe.pieces:
            size = piece.end - piece.start
            self._fill(piece, buffer[position : position + size])
            position += size
        pieces = recipe.pieces
        shape = (sum(p.shape[0] for p in pieces), *pieces[0].shape[1:]) if len(pieces) > 1 else pieces[0].shape
        tensor = raw.view(stored).reshape(shape) if prod(shape) else torch.empty(shape, dtype=stored)
        if stored.is_floating_point:
            tensor = tensor.to(device=device, dtype=dtype or (torch.bfloat16 if stored in _FLOAT8 else stored))
        else:
            tensor = tensor.to(device=device)
        return tensor.t().contiguous() if recipe.transpose else tensor

    def _fill(self, piece: Entry, buffer: memoryview) -> None:
        key = threading.get_ident(), piece.file
        file = self._files.get(key)
        if file is None:
            file = self._files[key] = piece.file.open("rb", buffering=0)
        file.seek(piece.start)
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(
                    f"{shown(piece.file)} ends inside the tensor '{piece.name}' though its header was whole: "
                    "it was changed while it was read, load it again."
                )
            done += count


def _stored_dtype(recipe: Recipe) -> torch.dtype:
    names = {piece.dtype for piece in recipe.pieces}
    first = recipe.pieces[0]
    if len(names) > 1 or first.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{shown(first.file)} stores '{first.name}' as {' and '.join(sorted(names))}, expected one type that torch "
            "knows for it and for the tensors it is joined with: save the file again in one type."
        )
    return TORCH_DTYPES[first.dtype]
