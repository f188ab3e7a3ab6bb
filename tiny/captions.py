"""Words for a scene: varied for training, canonical for measurements.

Every training caption names all objects with colour and shape; sizes, positions and the background are left out now
and then, so that the model learns that an attribute which is not named is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .drawing import Scene, SceneObject

_SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_SHAPES = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
}
_PLACES = {
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "at the top", "in the upper middle"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("on the left", "at the left", "on the left side"),
    "centre": ("in the centre", "in the middle", "at the center"),
    "right": ("on the right", "at the right", "on the right side"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "at the bottom", "in the lower middle"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
_DROP = 0.1
_DROP_BACKGROUND = 0.05


@dataclass(frozen=True)
class Description:
    """A caption and what it says: the objects in the order of mention, and which kinds of attributes are named."""

    text: str
    objects: tuple[SceneObject, ...]
    names_sizes: bool = True
    names_positions: bool = True
    names_background: bool = True


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption with random wording and order: the text of `describe`."""
    return describe(scene, rng).text


def describe(scene: Scene, rng: np.random.Generator) -> Description:
    """A caption with random wording and order; it leaves out the sizes or the positions with a chance of 10 % each
    and the background with a chance of 5 %."""
    sizes, positions = (bool(v) for v in rng.random(2) >= _DROP)
    background = bool(rng.random() >= _DROP_BACKGROUND)
    objects = list(scene.objects)
    if len(objects) == 2 and rng.random() < 0.5:
        objects.reverse()
    text = _sentence(scene, objects, rng, sizes, positions, background)
    return Description(text, tuple(objects), sizes, positions, background)


def _sentence(
    scene: Scene, objects: list[SceneObject], rng: np.random.Generator, sizes: bool, positions: bool, background: bool
) -> str:
    form = rng.choice(("after", "before", "list"), p=(0.55, 0.25, 0.2))
    if form == "list":
        parts = []
        for item in objects:
            parts.append(_noun(item, rng, sizes))
            if positions:
                parts.append(item.position)
        if background:
            parts.insert(0 if rng.random() < 0.3 else len(parts), _background(scene, rng))
        return ", ".join(parts)
    things = " and ".join(_phrase(item, rng, sizes, positions) for item in objects)
    if not background:
        return things
    if form == "before":
        link = rng.choice(("with", "with", "showing"))
        return f"{_with_article(_background(scene, rng))} {link} {things}"
    if scene.pattern == "plain" and rng.random() < 0.2:
        return f"{things} against {scene.background}"
    link = rng.choice(("on", "on", "against"))
    return f"{things} {link} {_with_article(_background(scene, rng))}"


def caption_full(scene: Scene) -> str:
    """The canonical caption, which names every attribute: what measurements prompt with."""
    return f"{' and '.join(map(object_phrase, scene.objects))} on {background_phrase(scene)}"


def object_phrase(item: SceneObject, rng: np.random.Generator | None = None) -> str:
    """Everything about one object, ``a small red circle at the top``; random wording with a generator."""
    if rng is not None:
        return _phrase(item, rng, with_size=True, with_place=True)
    return f"{_with_article(f'{item.size} {item.colour} {item.shape}')} {_PLACES[item.position][0]}"


def unplaced(scene: Scene) -> str:
    """The canonical caption without sizes and places: what a picture has to show in some other way."""
    things = " and ".join(_with_article(f"{item.colour} {item.shape}") for item in scene.objects)
    return f"{things} on {background_phrase(scene)}"


def background_phrase(scene: Scene) -> str:
    """The background alone, ``a red background``."""
    return _with_article(_canonical_background(scene))


def _canonical_background(scene: Scene) -> str:
    if scene.pattern == "striped":
        return f"{scene.background} and {scene.second} striped background"
    if scene.pattern == "graded":
        return f"background fading from {scene.background} to {scene.second}"
    return f"{scene.background} background"


def _background(scene: Scene, rng: np.random.Generator) -> str:
    first, second = scene.background, scene.second
    if scene.pattern == "striped":
        forms = (f"{first} and {second} striped background", f"background with {first} and {second} stripes")
    elif scene.pattern == "graded":
        forms = (f"background fading from {first} to {second}", f"{first} to {second} gradient background")
    else:
        forms = (f"{first} background", f"{first} background", f"plain {first} background", f"{first} backdrop")
    return str(rng.choice(forms))


def _noun(item: SceneObject, rng: np.random.Generator, with_size: bool) -> str:
    words = [item.colour, str(rng.choice(_SHAPES[item.shape]))]
    if with_size:
        words.insert(0, str(rng.choice(_SIZES[item.size])))
    return " ".join(words)


def _phrase(item: SceneObject, rng: np.random.Generator, with_size: bool, with_place: bool) -> str:
    noun = _with_article(_noun(item, rng, with_size))
    return f"{noun} {rng.choice(_PLACES[item.position])}" if with_place else noun


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
