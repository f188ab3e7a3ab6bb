"""Writes the example workflows, in both forms, out of their descriptions in `graphs`.

python -m stable_cascade_nodes.workflows.write
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..host.folders import DataFolders
from ..host.pack import open_host
from ..nodes import runtime
from .graphs import WORKFLOWS
from .layout import Writer

FOLDER = Path(__file__).parent
VERSION = "0.1.0"
REPOSITORY = "https://huggingface.co/stabilityai/stable-cascade/resolve/main"


@contextmanager
def writing() -> Iterator[Writer]:
    """A writer for the nodes of this package."""
    host = open_host(DataFolders(FOLDER))
    with runtime.using(host.backend):
        yield Writer(host.registry, VERSION, REPOSITORY)


def written() -> dict[str, str]:
    """The content of all files, by their path below this folder."""
    files = {}
    with writing() as writer:
        for workflow in WORKFLOWS:
            files[f"{workflow.name}.json"] = _json(writer.editor(workflow))
            files[f"api/{workflow.name}.json"] = _json(writer.api(workflow))
    return files


def _json(graph: object) -> str:
    return json.dumps(graph, indent=2, ensure_ascii=False) + "\n"


def write(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that nobody finds half of one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main() -> None:
    for name, content in written().items():
        write(FOLDER / name, content.encode())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
