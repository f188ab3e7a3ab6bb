"""Writes the help pages `web/docs/<node id>.md`, which ComfyUI shows beside the graph.

python -m stable_cascade_nodes.nodes.help_pages

Title, description and lists are what the nodes say of themselves. What a person wrote stays: all that follows the line
`## Hints`. Lists and no tables, for the panel that shows the pages is hardly wider than a node.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .locale import Node, documented_nodes, write_text

FOLDER = Path(__file__).parents[1] / "web" / "docs"
HINTS = "## Hints\n"


def page_path(node_id: str) -> Path:
    return FOLDER / f"{node_id}.md"


def hints_of(page: str) -> str:
    """What a person wrote in a page; empty where nobody has yet."""
    _, _, hints = page.partition(f"\n{HINTS}")
    return hints.strip()


def help_page(node: Node, hints: str) -> str:
    """The page of a node, in Markdown."""
    parts = [f"# {node.title}", node.description]
    if node.inputs:
        inputs = (
            f"- **{name}** ({_value(*entry)}): {_plain(entry[1]['tooltip'])}" for name, entry in node.inputs.items()
        )
        parts += ["## Inputs", "\n".join(inputs)]
    if node.outputs:
        outputs = (f"- **{name}** (`{kind}`): {_plain(tooltip)}" for name, kind, tooltip in node.outputs)
        parts += ["## Outputs", "\n".join(outputs)]
    return "\n\n".join([*parts, HINTS.rstrip(), hints]).rstrip() + "\n"


def written() -> dict[Path, str]:
    """The content of every page, with the hints that it has now."""
    return {
        page_path(name): help_page(node, hints_of(_read(page_path(name)))) for name, node in documented_nodes().items()
    }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _plain(text: str) -> str:
    """A tooltip, which is no Markdown, as Markdown that reads the same."""
    return re.sub(r"([\\`*<\[\]])", r"\\\1", text)


def _value(kind: Any, options: dict[str, Any], required: bool) -> str:
    """Type, range and default of an input, for people."""
    if isinstance(kind, (list, tuple)):
        # Which files there are depends on the machine.
        choices = "one of " + ", ".join(f"`{choice}`" for choice in kind)
        of_files = list(kind) == ["auto"] or any(str(choice).endswith("(bundled)") for choice in kind)
        names = "a file" if of_files else choices
        return f"{names}; default `{options['default']}`"
    said = [f"`{kind}`"]
    if "min" in options:
        said.append(f"{_number(options['min'])} to {_number(options['max'])}")
    if options.get("default", "") != "":
        said.append(f"default {_number(options['default'])}")
    elif not required:
        said.append("optional")
    return ", ".join(said)


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value > 2**31 and (value + 1).bit_count() == 1:
        return f"2^{value.bit_length()} - 1"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    for path, text in written().items():
        write_text(path, text)
        print(path if hints_of(text) else f"{path} (write its hints)")


if __name__ == "__main__":
    main()
