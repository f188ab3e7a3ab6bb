"""The pictures that the example workflows start from, none of which a training saw.

    python -m stable_cascade_nodes.tiny.examples

Writes `workflows/examples`: PNG files of 256 x 256 pixels (`small` has 128), of which `hole` is transparent where its
object is, and `faces.jsonl`, which says where the objects of each are and which (see `objects`).
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .adapter_inputs import object_mask
from .drawing import Scene, SceneObject, render
from .family import IMAGE_SIZE
from .objects import faces_of

FOLDER = Path(__file__).parents[1] / "workflows" / "examples"
SMALL = IMAGE_SIZE // 2


def _object(
    shape: str, colour: str, size: str, position: str, place: tuple[float, float, float], rgb: tuple
) -> SceneObject:
    return SceneObject(shape, colour, size, position, *place, rgb)


def _plain(background: str, rgb: tuple[int, int, int], *objects: SceneObject) -> Scene:
    return Scene(background, rgb, objects)


# Drawn by chance from the test split once, then written down: finding such a scene again takes minutes.
_CYAN_CIRCLE = _object("circle", "cyan", "large", "right", (0.6877, 0.5046, 0.2739), (71, 215, 222))
_BLACK_SQUARE = _object("square", "black", "small", "top right", (0.784, 0.2248, 0.1541), (25, 18, 24))
_CYAN_TRIANGLE = _object("triangle", "cyan", "large", "left", (0.3279, 0.5008, 0.287), (75, 208, 225))
_PURPLE_CROSS = _object("cross", "purple", "large", "centre", (0.4946, 0.5085, 0.2983), (150, 39, 142))
_RED_CIRCLE = _object("circle", "red", "small", "left", (0.2139, 0.5199, 0.1628), (215, 35, 33))
_YELLOW_RING = _object("ring", "yellow", "large", "bottom right", (0.6774, 0.6863, 0.2745), (252, 223, 59))
_ORANGE_CIRCLE = _object("circle", "orange", "large", "centre", (0.4975, 0.5068, 0.286), (252, 145, 21))
_WHITE_SQUARE = _object("square", "white", "large", "centre", (0.508, 0.4935, 0.2842), (245, 247, 252))
_BLUE_CIRCLE = _object("circle", "blue", "large", "right", (0.6791, 0.4913, 0.2895), (30, 79, 206))
SCENES = {
    "circle": _plain("blue", (33, 81, 209), _CYAN_CIRCLE),
    "square": _plain("cyan", (66, 208, 228), _BLACK_SQUARE),
    "triangle": _plain("yellow", (247, 229, 55), _CYAN_TRIANGLE),
    "cross": _plain("white", (246, 243, 243), _PURPLE_CROSS),
    "two": _plain("green", (31, 149, 59), _RED_CIRCLE, _YELLOW_RING),
    "striped": Scene("white", (251, 248, 246), (_ORANGE_CIRCLE,), "striped", "blue"),
    "hole": _plain("purple", (152, 36, 143), _WHITE_SQUARE),
    "small": _plain("orange", (247, 136, 26), _BLUE_CIRCLE),
}


def scenes() -> dict[str, Scene]:
    """The scene of every picture, by its name."""
    return dict(SCENES)


def pictures() -> dict[str, Image.Image]:
    """The pictures, by name."""
    made = {}
    for name, scene in scenes().items():
        pixels = render(scene, SMALL if name == "small" else IMAGE_SIZE)
        if name == "hole":
            alpha = np.where(object_mask(scene), 0, 255).astype(np.uint8)
            pixels = np.concatenate([pixels, alpha[..., None]], axis=-1)
        made[name] = Image.fromarray(pixels)
    return made


def faces() -> str:
    """The lines of `faces.jsonl`."""
    lines = []
    for name, scene in scenes().items():
        lines.append(json.dumps({"name": name, **faces_of(scene, SMALL if name == "small" else IMAGE_SIZE)}))
    return "\n".join(lines) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    files = {"faces.jsonl": faces().encode()}
    for name, picture in pictures().items():
        content = io.BytesIO()
        picture.save(content, "PNG", optimize=True)
        files[f"{name}.png"] = content.getvalue()
    for name, content in files.items():
        temporary = FOLDER / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, FOLDER / name)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
