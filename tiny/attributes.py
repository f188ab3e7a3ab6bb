"""What a picture shows and what a caption says of it, as class indices: what the CLIP towers learn to tell."""

from __future__ import annotations

import numpy as np

from .captions import Description, caption_full
from .drawing import COLOURS, PATTERNS, POSITION_NAMES, SHAPES, SIZES, Scene, SceneObject, signed_distance

_UNNAMED = "unnamed"
_NONE = "none"

CLASSES: dict[str, tuple[str, ...]] = {
    "background": (*COLOURS, _UNNAMED),
    "pattern": (*PATTERNS, _UNNAMED),
    "second": (*COLOURS, _NONE, _UNNAMED),
}
for _slot in ("first", "other"):
    CLASSES |= {
        f"{_slot} colour": (*COLOURS, _NONE),
        f"{_slot} shape": (*SHAPES, _NONE),
        f"{_slot} size": (*SIZES, _NONE, _UNNAMED),
        f"{_slot} position": (*POSITION_NAMES, _NONE, _UNNAMED),
    }
CLASS_COUNTS = {name: len(values) for name, values in CLASSES.items()}

# In which order a caption mentions objects is an attribute of the caption alone.
MENTIONED = "mentioned "
MENTIONED_COUNTS = {MENTIONED + name: count for name, count in CLASS_COUNTS.items()}

# Class maps: shape and colour of what covers a point, 0 is background.
MAP_CLASSES = (1 + len(SHAPES), 1 + len(COLOURS))
MAP_SIZE = 48


def attributes(description: Description, scene: Scene, *, ordered: bool) -> dict[str, int]:
    """The class index of every attribute of a caption.

    `ordered` keeps the order of mention. Otherwise the first object is the one that comes first in reading order,
    which two captions of one picture agree on; without named positions the order of mention is all there is.
    """
    objects = list(description.objects)
    if not ordered and description.names_positions:
        objects.sort(key=lambda item: POSITION_NAMES.index(item.position))
    names = {
        "background": scene.background if description.names_background else _UNNAMED,
        "pattern": scene.pattern if description.names_background else _UNNAMED,
        "second": (scene.second or _NONE) if description.names_background else _UNNAMED,
    }
    for index, slot in enumerate(("first", "other")):
        item: SceneObject | None = objects[index] if index < len(objects) else None
        names[f"{slot} colour"] = item.colour if item else _NONE
        names[f"{slot} shape"] = item.shape if item else _NONE
        names[f"{slot} size"] = (item.size if description.names_sizes else _UNNAMED) if item else _NONE
        names[f"{slot} position"] = (item.position if description.names_positions else _UNNAMED) if item else _NONE
    return {name: CLASSES[name].index(value) for name, value in names.items()}


def caption_attributes(description: Description, scene: Scene) -> dict[str, int]:
    """What a caption says, and, with the prefix `MENTIONED`, in which order."""
    mentioned = attributes(description, scene, ordered=True)
    return attributes(description, scene, ordered=False) | {MENTIONED + name: v for name, v in mentioned.items()}


def picture_attributes(scene: Scene) -> dict[str, int]:
    """What a picture shows: what its canonical caption says."""
    return attributes(Description(caption_full(scene), scene.objects), scene, ordered=False)


def class_maps(scene: Scene) -> np.ndarray:
    """Which shape and which colour covers each point of a grid: uint8 ``[MAP_SIZE, MAP_SIZE, 2]``, 0 background."""
    labels = np.zeros((MAP_SIZE, MAP_SIZE, 2), dtype=np.uint8)
    axis = (np.arange(MAP_SIZE) + 0.5) / MAP_SIZE
    for item in scene.objects:
        x, y = (axis[None, :] - item.x) / item.radius, (axis[:, None] - item.y) / item.radius
        inside = signed_distance(item.shape, x, y) < 0
        labels[inside] = 1 + SHAPES.index(item.shape), 1 + list(COLOURS).index(item.colour)
    return labels
