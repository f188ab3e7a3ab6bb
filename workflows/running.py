"""Runs the graphs of workflows and keeps what their nodes show."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..host.folders import DataFolders
from ..host.pack import open_host


class Runner:
    """A host for graphs in API format, with its files in `data`: what two runs have in common is made once."""

    def __init__(self, data: Path) -> None:
        self._host = open_host(DataFolders(data))

    def shown(self, graph: dict[str, Any], nodes: Iterable[str] = ()) -> dict[str, list[Image.Image]]:
        """The pictures that each node of `graph` saves or shows, by node id.

        nodes: run these output nodes and what they need; none is all of them. ValueError where the graph is refused
        or fails.
        """
        status, answer = self._host.submit({"prompt": graph, "partial_execution_targets": list(nodes) or None})
        if status != 200 or answer["node_errors"]:
            raise ValueError(f"The workflow was refused: {json.dumps(answer)}")
        self._host.run_next()
        entry = self._host.history(answer["prompt_id"])[answer["prompt_id"]]
        if not entry["status"]["completed"]:
            raise ValueError(f"The workflow failed: {entry['status']['messages'][-1][1]['exception_message']}")
        return {
            node_id: [self._read(file) for file in output["images"]]
            for node_id, output in entry["outputs"].items()
            if "images" in output
        }

    def _read(self, file: dict[str, str]) -> Image.Image:
        folder = self._host.folders.directory(file["type"]) / file["subfolder"]
        with Image.open(folder / file["filename"]) as picture:
            return picture.convert("RGB")


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """A picture with `side` pixels on its longer side."""
    scale = side / max(picture.size)
    return picture.resize([round(length * scale) for length in picture.size], Image.Resampling.LANCZOS)


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """A picture in the middle of a white square, as large as fits."""
    small, square = scaled(picture, side), Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def as_jpeg(picture: Image.Image) -> bytes:
    """The content of a JPEG file."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85, optimize=True)
    return content.getvalue()
