"""Writes `locales/en/nodeDefs.json`, the texts that ComfyUI shows and translators start from, out of the nodes.

python -m stable_cascade_nodes.nodes.locale
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json"


def node_texts() -> dict[str, Any]:
    """Titles, descriptions, names and tooltips of all nodes, in ComfyUI's form."""
    from .. import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    nodes: dict[str, Any] = NODE_CLASS_MAPPINGS

    return {
        name: {
            "display_name": NODE_DISPLAY_NAME_MAPPINGS[name],
            "description": node.DESCRIPTION,
            "inputs": {
                entry: {"name": entry, "tooltip": options["tooltip"]}
                for inputs in node.INPUT_TYPES().values()
                for entry, (_, options) in inputs.items()
            },
            "outputs": {
                str(slot): {"name": label, "tooltip": tooltip}
                for slot, (label, tooltip) in enumerate(zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True))
            },
        }
        for name, node in nodes.items()
    }


def written() -> str:
    """The content of the file."""
    return json.dumps(node_texts(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    temporary = PATH.with_suffix(".tmp")
    PATH.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(written(), encoding="utf-8")
    os.replace(temporary, PATH)
    print(PATH)


if __name__ == "__main__":
    main()
