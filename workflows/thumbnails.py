"""Makes the thumbnails of the example workflows by running them.

python -m stable_cascade_nodes.workflows.thumbnails [NAME ...]

Every workflow is run with the models that are there, the tiny family where there are no others (and where
`CASCADE_MODELS` names none). Of what it saved, up to four pictures are shown side by side.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from PIL import Image

from ..host.folders import DataFolders
from ..host.pack import open_host
from .write import FOLDER, write

SIDE = 512
_COLUMNS = 2


def thumbnail(pictures: list[Image.Image]) -> Image.Image:
    """Up to four pictures in a square of 512 pixels, each as large as fits."""
    pictures = pictures[:4]
    columns = min(len(pictures), _COLUMNS)
    rows = -(-len(pictures) // columns)
    cell = SIDE // columns
    sheet = Image.new("RGB", (SIDE, cell * rows), "white")
    for number, picture in enumerate(pictures):
        scale = cell / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        row, column = divmod(number, columns)
        sheet.paste(small, (column * cell + (cell - small.width) // 2, row * cell + (cell - small.height) // 2))
    return sheet


def pictures_of(graph: dict, data: Path) -> list[Image.Image]:
    """Run a graph in API format with its files in `data`; returns the pictures that it saves, by node id."""
    host = open_host(DataFolders(data))
    status, answer = host.submit({"prompt": graph})
    if status != 200 or answer["node_errors"]:
        raise ValueError(f"The workflow was refused: {json.dumps(answer)}")
    host.run_next()
    entry = host.history(answer["prompt_id"])[answer["prompt_id"]]
    if not entry["status"]["completed"]:
        raise ValueError(f"The workflow failed: {entry['status']['messages'][-1][1]['exception_message']}")
    found = []
    for node_id in sorted(entry["outputs"], key=int):
        # Others are shown only, such as the picture of a loss on the node that trains.
        for image in entry["outputs"][node_id].get("images", ()) if graph[node_id]["class_type"] == "SaveImage" else ():
            folder = host.folders.directory(image["type"]) / image["subfolder"]
            found.append(Image.open(folder / image["filename"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the thumbnails of the example workflows by running them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows to do (default: all)")
    names = parser.parse_args().names or sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
    for name in names:
        graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            picture = thumbnail(pictures_of(graph, Path(folder)))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=85, optimize=True)
        write(FOLDER / f"{name}.jpg", content.getvalue())
        print(FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
