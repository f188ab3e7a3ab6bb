"""Makes the pictures on the pages of the tasks by running the example workflows.

python -m stable_cascade_nodes.workflows.pictures [NAME ...]

A workflow's `shots` say what is shown: each is a picture that one of its nodes saves or shows, with or without changes
to the graph. Graphs run with the models that are there, the tiny family where there are no others (and where
`CASCADE_MODELS` names none). What two shots have in common is made once. The picture is `docs/tasks/<name>.jpg`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .graphs import WORKFLOWS
from .layout import Column, Node, Shot, Workflow, Writer
from .running import Runner, as_jpeg, fitted
from .write import write, writing

FOLDER = Path(__file__).parents[1] / "docs" / "tasks"
SHOWING = ("SaveImage", "PreviewImage")

_CELL, _COLUMNS, _GAP = 256, 4, 12
_WIDTH = _COLUMNS * _CELL + (_COLUMNS - 1) * _GAP
_TEXT, _LINE = 16, 20
# Of a batch, so many pictures in all and beside each other.
_MOST, _BESIDE = 20, 10

Changes = dict[int, dict[str, Any]]


def changed(workflow: Workflow, changes: Changes) -> Workflow:
    """`workflow` with other inputs of some nodes; ValueError for a node that it does not have."""
    unknown = changes.keys() - {node.id for node in workflow.nodes()}
    if unknown:
        numbers = ", ".join(map(str, sorted(unknown)))
        raise ValueError(f"{workflow.name} has no node {numbers}: change one of {_numbers(workflow)}.")
    columns = (
        replace(column, nodes=tuple(replace(n, inputs={**n.inputs, **changes.get(n.id, {})}) for n in column.nodes))
        for column in workflow.columns
    )
    return replace(workflow, columns=tuple(columns))


def with_shot(workflow: Workflow, shot: Shot, writer: Writer) -> tuple[Workflow, int]:
    """`workflow` with the changes of a shot, and its node that shows the picture: one is added behind a node that only
    gives pictures to others.

    ValueError where the shot is of a node without pictures.
    """
    made = changed(workflow, shot.changes)
    kinds = {node.id: node.class_type for node in made.nodes()}
    kind = kinds.get(shot.node)
    if kind in SHOWING:
        return made, shot.node
    outputs = writer.outputs(kind) if kind else ()
    if "IMAGE" not in outputs:
        found = f"a {kind} without pictures" if kind else "missing"
        raise ValueError(
            f"{workflow.name}: node {shot.node} of the shot {shot.caption!r} is {found}, expected one that saves, "
            "shows or gives pictures: name the node that does."
        )
    added = Node(max(kinds) + shot.node, "PreviewImage", {"images": (shot.node, outputs.index("IMAGE"))})
    return replace(made, columns=(*made.columns, Column("", (added,)))), added.id


def pictures_of_shots(workflow: Workflow, writer: Writer, runner: Runner) -> list[list[Image.Image]]:
    """The pictures of each shot of a workflow, in the order of the shots."""
    found = []
    for shot in workflow.shots:
        made, node = with_shot(workflow, shot, writer)
        found.append(runner.shown(writer.api(made), [str(node)])[str(node)])
    return found


def task_picture(shots: tuple[Shot, ...], pictures: list[list[Image.Image]]) -> Image.Image:
    """The shots side by side on white, four in a row, with their captions below.

    A shot of one picture, or the first one of several, is a cell of 256 pixels. A whole batch has a row to itself, up
    to 20 pictures in two lines.
    """
    rows: list[list[tuple[Image.Image, str]]] = [[]]
    for shot, found in zip(shots, pictures, strict=True):
        if shot.batch:
            rows += [[(_batch(found[:_MOST]), shot.caption)], []]
        else:
            if len(rows[-1]) == _COLUMNS:
                rows.append([])
            rows[-1].append((fitted(found[0], _CELL), shot.caption))
    return _below([_strip(row) for row in rows if row])


def _batch(pictures: list[Image.Image]) -> Image.Image:
    lines = -(-len(pictures) // _BESIDE)
    columns = max(_COLUMNS, -(-len(pictures) // lines))
    cell = (_WIDTH - (columns - 1) * _GAP) // columns
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return _below([_beside([fitted(picture, cell) for picture in row]) for row in rows])


def _strip(row: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures with their captions, side by side."""
    captioned = []
    for picture, caption in row:
        lines = _wrapped(caption, picture.width)
        cell = Image.new("RGB", (picture.width, picture.height + 6 + _LINE * len(lines)), "white")
        cell.paste(picture)
        draw = ImageDraw.Draw(cell)
        for number, line in enumerate(lines):
            place = picture.width / 2, picture.height + 6 + _LINE * number
            draw.text(place, line, fill="black", font=ImageFont.load_default(_TEXT), anchor="ma")
        captioned.append(cell)
    return _beside(captioned)


def _wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` pixels; a longer word has a line to itself."""
    font, lines = ImageFont.load_default(_TEXT), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _beside(pictures: list[Image.Image]) -> Image.Image:
    width = sum(picture.width + _GAP for picture in pictures) - _GAP
    sheet, left = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white"), 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + _GAP
    return sheet


def _below(pictures: list[Image.Image]) -> Image.Image:
    height = sum(picture.height + _GAP for picture in pictures) - _GAP
    sheet, top = Image.new("RGB", (max(picture.width for picture in pictures), height), "white"), 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + _GAP
    return sheet


def _numbers(workflow: Workflow) -> str:
    return ", ".join(str(node.id) for node in workflow.nodes())


def main() -> None:
    known = {workflow.name: workflow for workflow in WORKFLOWS if workflow.shots}
    parser = argparse.ArgumentParser(description="Make the pictures on the pages of the tasks by running workflows.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows to do (default: all that have shots)")
    names = parser.parse_args().names or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no workflow with shots is called {unknown[0]}: choose from {', '.join(known)}")
    FOLDER.mkdir(exist_ok=True)
    with writing() as writer:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                pictures = pictures_of_shots(known[name], writer, Runner(Path(folder)))
            write(FOLDER / f"{name}.jpg", as_jpeg(task_picture(known[name].shots, pictures)))
            print(FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
