"""Makes the thumbnails of the example workflows by running them.

python -m stable_cascade_nodes.workflows.thumbnails [NAME ...]

Every workflow is run with the models that are there, the tiny family where there are no others (and where
`CASCADE_MODELS` names none). Of what it saved, up to four pictures are shown side by side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from PIL import Image

from .running import Runner, as_jpeg, fitted, scaled
from .write import FOLDER, write

SIDE = 512
_COLUMNS = 2


def thumbnail(pictures: list[Image.Image]) -> Image.Image:
    """A picture with 512 pixels on its longer side, or up to four in a square of so many, each as large as fits."""
    if len(pictures) == 1:
        return scaled(pictures[0], SIDE)
    pictures, cell = pictures[:4], SIDE // _COLUMNS
    sheet = Image.new("RGB", (SIDE, cell * -(-len(pictures) // _COLUMNS)), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, _COLUMNS)
        sheet.paste(fitted(picture, cell), (column * cell, row * cell))
    return sheet


def pictures_of(graph: dict, data: Path) -> list[Image.Image]:
    """Run a graph in API format with its files in `data`; returns the pictures that it saves, by node id."""
    shown = Runner(data).shown(graph)
    # Others are shown only, such as the picture of a loss on the node that trains.
    saves = sorted((node_id for node_id in shown if graph[node_id]["class_type"] == "SaveImage"), key=int)
    return [picture for node_id in saves for picture in shown[node_id]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the thumbnails of the example workflows by running them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows to do (default: all)")
    names = parser.parse_args().names or sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
    for name in names:
        graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            picture = thumbnail(pictures_of(graph, Path(folder)))
        write(FOLDER / f"{name}.jpg", as_jpeg(picture))
        print(FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
