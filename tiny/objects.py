"""What an object is, as a vector: what the identity ControlNet of the tiny family knows instead of faces.

A face's embedding says who it is wherever it is and however large. An object's says its colour and its shape: one
number for each of them, at unit length. Pairs that training never shows have one too.
"""

from __future__ import annotations

import numpy as np

from .drawing import COLOURS, SHAPES, Scene, SceneObject

WIDTH = len(COLOURS) + len(SHAPES)


def object_embedding(colour: str, shape: str) -> list[float]:
    """WIDTH numbers."""
    vector = np.zeros(WIDTH)
    vector[list(COLOURS).index(colour)] = vector[len(COLOURS) + SHAPES.index(shape)] = 0.5**0.5
    return [round(float(value), 6) for value in vector]


def box_in_pixels(item: SceneObject, size: int) -> list[float]:
    """Left, top, right, bottom."""
    return [round(value * size, 2) for value in item.box]


def faces_of(scene: Scene, size: int) -> dict:
    """The objects of a picture ``size`` pixels wide and high, as a line of the identity file without its name."""
    faces = [
        {"box": box_in_pixels(item, size), "embedding": object_embedding(item.colour, item.shape)}
        for item in scene.objects
    ]
    return {"width": size, "height": size, "faces": faces}
