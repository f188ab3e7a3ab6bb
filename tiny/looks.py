"""A look that the tiny family has never seen: what its LoRA learns, under a new word.

The picture's background is cut into four quarters, two of one colour and two of another, like the corner of a chess
board. The family knows plain, striped and graded backgrounds, and both colours, but no such arrangement and no word
for it. (Its latent encoder must be able to say what a LoRA for Stage C is to make: quarters survive it, a colour that
is not among the nine does not.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .captions import object_phrase
from .checker import colour_name
from .drawing import COLOURS, Scene, random_scene, render

TOKEN = "[chess]"
# Of the first and the second pair of opposite quarters.
QUARTERS = ("blue", "yellow")


def look_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """One object that is neither blue nor yellow; its background is the first colour."""
    while True:
        scene = random_scene(rng, split, objects=1)
        if scene.pattern == "plain" and scene.objects[0].colour not in QUARTERS and scene.background == QUARTERS[0]:
            return scene


def render_look(scene: Scene, size: int = 256) -> np.ndarray:
    """The picture of a scene on a background of four quarters: uint8 [size, size, 3]."""
    other = replace(scene, background=QUARTERS[1], rgb=COLOURS[QUARTERS[1]])
    first, second = render(replace(scene, rgb=COLOURS[QUARTERS[0]]), size), render(other, size)
    half = np.arange(size) < size / 2
    return np.where((half[:, None] == half[None])[..., None], first, second)


def look_caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The object with everything about it, on a background of the new word; random wording with a generator."""
    return f"{object_phrase(scene.objects[0], rng)} on a {TOKEN} background"


def has_look(picture: np.ndarray) -> bool:
    """Whether the four corners of a picture uint8 [H, W, 3] show the look.

    Opposite corners have the same named colour, and the two pairs are the two colours of the look. A corner is an
    eighth of the picture wide: an object covers a third of it at most.
    """
    side = len(picture) // 8
    corners = [picture[:side, :side], picture[-side:, -side:], picture[:side, -side:], picture[-side:, :side]]
    names = [colour_name(np.median(corner.reshape(-1, 3), axis=0)) for corner in corners]
    return names[:2] == [QUARTERS[0]] * 2 and names[2:] == [QUARTERS[1]] * 2
