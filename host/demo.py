"""The graph that a demo picture carries, so that it can be opened and changed in ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .graph import as_link


def demo_graph(path: Path, text: str, seed: int) -> dict[str, Any]:
    """The API-format graph at `path` with `text` as its positive prompt and `seed` in every node that has one."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    placed = False
    for node in graph.values():
        inputs = node["inputs"]
        if isinstance(inputs.get("seed"), int):
            inputs["seed"] = seed
        link = as_link(inputs.get("positive"))
        if link is not None and isinstance(graph[link.node]["inputs"].get("text"), str):
            graph[link.node]["inputs"]["text"] = text
            placed = True
    if not placed:
        raise ValueError(f"{path.name}: no input 'positive' is linked to a node with a 'text' to put the prompt into")
    return graph
