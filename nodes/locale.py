"""Writes `locales/en/nodeDefs.json`, the texts that ComfyUI shows and translators start from, out of the nodes.

python -m stable_cascade_nodes.nodes.locale
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json"


class Node(NamedTuple):
    """What a node says of itself: `inputs` maps names to `(type, options, required)`, without the hidden ones."""

    title: str
    description: str
    inputs: dict[str, tuple[Any, dict[str, Any], bool]]
    outputs: list[tuple[str, str, str]]  # name, type, tooltip


def documented_nodes() -> dict[str, Node]:
    """All nodes of this package by id, those too that are there only inside ComfyUI."""
    from .. import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from . import bridge

    nodes: dict[str, Any] = NODE_CLASS_MAPPINGS | bridge.NODE_CLASS_MAPPINGS
    titles = NODE_DISPLAY_NAME_MAPPINGS | bridge.NODE_DISPLAY_NAME_MAPPINGS
    return {name: _described(node, titles[name]) for name, node in nodes.items()}


def _described(node: Any, title: str) -> Node:
    declared = node.INPUT_TYPES()
    inputs = {
        name: (entry[0], entry[1] if len(entry) > 1 else {}, kind == "required")
        for kind in ("required", "optional")
        for name, entry in declared.get(kind, {}).items()
    }
    outputs = zip(node.RETURN_NAMES, node.RETURN_TYPES, node.OUTPUT_TOOLTIPS, strict=True)
    return Node(title, node.DESCRIPTION, inputs, list(outputs))


def node_texts() -> dict[str, Any]:
    """Titles, descriptions, names and tooltips of all nodes, in ComfyUI's form."""
    return {
        name: {
            "display_name": node.title,
            "description": node.description,
            "inputs": {
                entry: {"name": entry, "tooltip": options["tooltip"]} for entry, (_, options, _) in node.inputs.items()
            },
            "outputs": {
                str(slot): {"name": label, "tooltip": tooltip} for slot, (label, _, tooltip) in enumerate(node.outputs)
            },
        }
        for name, node in documented_nodes().items()
    }


def written() -> str:
    """The content of the file."""
    return json.dumps(node_texts(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    write_text(PATH, written())
    print(PATH)


def write_text(path: Path, text: str) -> None:
    """Write a file, under another name until it is complete."""
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
