"""Opening an ONNX file with onnxruntime, which only people who find faces need."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Network:
    """An ONNX file that reads pictures.

    shape: of its first input as the file says it, with None where any size will do. inputs: how many it has. outputs:
    the shapes of its outputs in the same way. name: of the file, for messages.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError where onnxruntime is missing or the file cannot be opened."""
        self.name = Path(path).name
        runtime = onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # What goes wrong is raised.
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for each way to fail
            raise ValueError(
                f"{self.name} cannot be opened ({str(error).splitlines()[0]}), expected an ONNX model: download it "
                "again."
            ) from error
        inputs = self._session.get_inputs()
        self._input, self.inputs = inputs[0].name, len(inputs)
        self.shape = _sides(inputs[0].shape)
        self.outputs = [_sides(output.shape) for output in self._session.get_outputs()]

    def run(self, pictures: np.ndarray) -> list[np.ndarray]:
        """All outputs for float32 ``[B, 3, H, W]``; ValueError where the file refuses them."""
        try:
            return self._session.run(None, {self._input: pictures})
        except Exception as error:
            raise ValueError(
                f"{self.name} failed on pictures of shape {list(pictures.shape)} ({str(error).splitlines()[0]}): use "
                "another file."
            ) from error

    def describe(self) -> str:
        """Its input and outputs in words, for messages: ``reads [1, 3, 112, 112] and gives 1 outputs ([1, 512])``."""
        shapes = " and ".join(dict.fromkeys(map(_written, self.outputs)))
        return f"reads {_written(self.shape)} and gives {len(self.outputs)} outputs ({shapes})"


def _sides(shape: Sequence[object]) -> tuple[int | None, ...]:
    """Names of sides, and what is not a size, as None."""
    return tuple(side if isinstance(side, int) and side > 0 else None for side in shape)


def _written(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if side is None else str(side) for side in shape)}]"


def onnxruntime() -> Any:
    """The module; ValueError with the command that installs it where it is missing."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(
            f"Finding faces needs the package onnxruntime, which cannot be imported ({error}): install it with "
            "pip install onnxruntime, or pip install 'stable-cascade-nodes[faces]'."
        ) from error
