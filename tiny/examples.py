"""The pictures that the example workflows start from, none of which a training saw.

    python -m stable_cascade_nodes.tiny.examples

Writes `workflows/pictures`: PNG files of 256 x 256 pixels (`small` has 128), of which `hole` is transparent where its
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
from .drawing import Scene, random_scene, render
from .family import IMAGE_SIZE
from .objects import faces_of

FOLDER = Path(__file__).parents[1] / "workflows" / "pictures"
SMALL = IMAGE_SIZE // 2


def _scene(shape: str, size: str, position: str, background: str, pattern: str = "plain", objects: int = 1) -> Scene:
    """The first scene of the test split that has these."""
    rng = np.random.default_rng(2026)
    while True:
        scene = random_scene(rng, "test", objects=objects)
        item = scene.objects[0]
        found = (item.shape, item.size, item.position, scene.background, scene.pattern)
        if found == (shape, size, position, background, pattern):
            return scene


def scenes() -> dict[str, Scene]:
    """The scene of every picture, by its name."""
    return {
        "circle": _scene("circle", "large", "right", "blue"),
        "square": _scene("square", "small", "top right", "cyan"),
        "triangle": _scene("triangle", "large", "left", "yellow"),
        "cross": _scene("cross", "large", "centre", "white"),
        "two": _scene("circle", "small", "left", "green", objects=2),
        "striped": _scene("circle", "large", "centre", "white", pattern="striped"),
        "hole": _scene("square", "large", "centre", "purple"),
        "small": _scene("cross", "large", "right", "orange"),
    }


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
