"""Write drawn scenes as ordinary folders of pictures, which the trainer reads like anyone's.

    python -m stable_cascade_nodes.tiny.dataset scenes --out DIR --count 40000

Kinds:

* ``scenes``: what the family learns from. ``metadata.jsonl`` has captions with random wording (a list), class maps of
  shape and colour, and attributes.
* ``patterned``: the same, on striped and graded backgrounds alone, two of three with two objects. Among the scenes such
  pictures are 6 in 100, too few to learn how an object looks before a pattern.
* ``captions``: for the text encoder; the attributes are those that each caption names. The pictures are tiny.
* ``control``: for ControlNets and the IP-Adapter; captions leave out now this and now that, down to the background
  alone. ``faces.jsonl`` says what each object is and where, for the identity ControlNet.
* ``look``: pictures of a look that the family has never seen, whose captions say ``[chess]``, and as many others.

Scene i depends on kind, seed and i alone. An interrupted run goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .attributes import caption_attributes, class_maps, picture_attributes
from .captions import Description, background_phrase, caption_full, describe, unplaced
from .drawing import Scene, random_scene, render
from .family import IMAGE_SIZE
from .looks import look_caption, look_scene, render_look
from .objects import faces_of

CAPTIONS_PER_SCENE = 3
METADATA, FACES = "metadata.jsonl", "faces.jsonl"
_CAPTION_PICTURE_SIZE = 64
_CHUNK = 200
# Share of the captions of the text encoder that are the canonical one.
_CANONICAL = 0.15


@dataclass(frozen=True)
class Drawn:
    """One row of a dataset. row: of the metadata, without file names. faces: of the identity file, without its name."""

    picture: np.ndarray
    row: dict
    maps: np.ndarray | None = None
    faces: dict | None = None


# The random numbers of each use; a number once given stays, so that a picture does too.
_STREAMS = {"scenes": 0, "captions": 1, "control": 2, "look": 3, "examples": 4, "patterned": 5}


def _generator(kind: str, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAMS[kind], index])


def draw_scene(seed: int, index: int) -> Drawn:
    rng = _generator("scenes", seed, index)
    return _described(random_scene(rng), rng)


def draw_patterned(seed: int, index: int) -> Drawn:
    rng = _generator("patterned", seed, index)
    objects = 2 if index % 3 else 1
    while (scene := random_scene(rng, objects=objects)).pattern == "plain":
        pass
    return _described(scene, rng)


def _described(scene: Scene, rng: np.random.Generator) -> Drawn:
    captions = [describe(scene, rng).text for _ in range(CAPTIONS_PER_SCENE)]
    row = {"captions": captions, "attributes": picture_attributes(scene)}
    return Drawn(render(scene, IMAGE_SIZE), row, class_maps(scene))


def draw_caption(seed: int, index: int) -> Drawn:
    rng = _generator("captions", seed, index)
    # Captions of two objects are the harder half, so they are as frequent as captions of one.
    scene = random_scene(rng, objects=1 + index % 2)
    canonical = Description(caption_full(scene), scene.objects)
    said = [canonical if rng.random() < _CANONICAL else describe(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
    row = {"captions": [d.text for d in said], "attributes": [caption_attributes(d, scene) for d in said]}
    return Drawn(render(scene, _CAPTION_PICTURE_SIZE), row)


def draw_control(seed: int, index: int) -> Drawn:
    rng = _generator("control", seed, index)
    scene = random_scene(rng)
    captions = [describe(scene, rng).text, unplaced(scene), background_phrase(scene)]
    return Drawn(render(scene, IMAGE_SIZE), {"captions": captions}, faces=faces_of(scene, IMAGE_SIZE))


def draw_look(seed: int, index: int) -> Drawn:
    rng = _generator("look", seed, index)
    if index % 2:  # an ordinary picture, so that the look stays with its word
        scene = random_scene(rng, objects=1)
        return Drawn(render(scene, IMAGE_SIZE), {"captions": [describe(scene, rng).text]})
    scene = look_scene(rng)
    return Drawn(render_look(scene, IMAGE_SIZE), {"captions": [look_caption(scene, rng)]})


KINDS: dict[str, Callable[[int, int], Drawn]] = {
    "scenes": draw_scene,
    "captions": draw_caption,
    "control": draw_control,
    "look": draw_look,
    "patterned": draw_patterned,
}


def training_scene(seed: int, index: int, split: str = "train") -> Scene:
    """A scene of a split, from its seed and number alone."""
    return random_scene(_generator("examples", seed, index), split)


def write_dataset(kind: str, folder: Path, count: int, *, seed: int = 0, jobs: int = 2) -> Path:
    """Write `count` pictures with their metadata; returns the metadata's path, which is the last to appear.

    Raises:
        ValueError: another kind than KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"The kind of dataset is {kind!r}, expected one of {', '.join(KINDS)}.")
    table = folder / METADATA
    if table.exists():
        return table
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    work = [(kind, folder, start, min(start + _CHUNK, count), seed) for start in range(0, count, _CHUNK)]
    missing = [item for item in work if not _part(folder, item[2], METADATA).exists()]
    if jobs > 1 and len(missing) > 1:
        with multiprocessing.get_context("spawn").Pool(jobs) as workers:
            for _ in workers.imap_unordered(_write_part, missing):
                pass
    else:
        for item in missing:
            _write_part(item)
    for name in (FACES, METADATA):
        parts = [path for item in work if (path := _part(folder, item[2], name)).exists()]
        if parts:
            _write_text(folder / name, "".join(part.read_text(encoding="utf-8") for part in parts))
    shutil.rmtree(folder / _PARTS)
    return table


# Hidden, so that a half-written folder is not taken for a whole one.
_PARTS = ".parts"


def _part(folder: Path, start: int, name: str) -> Path:
    return folder / _PARTS / f"{start:07d}.{name}"


def _write_part(work: tuple[str, Path, int, int, int]) -> None:
    kind, folder, start, stop, seed = work
    rows, faces = [], []
    for index in range(start, stop):
        drawn = KINDS[kind](seed, index)
        name = f"pictures/{index:06d}.png"
        height, width = drawn.picture.shape[:2]
        row = {"file_name": name, "width": width, "height": height, **drawn.row}
        _write_picture(folder / name, drawn.picture, "RGB")
        if drawn.maps is not None:
            row["maps"] = f"maps/{index:06d}.png"
            _write_picture(folder / row["maps"], drawn.maps, "LA")
        if drawn.faces is not None:
            faces.append({"name": f"{index:06d}.png", **drawn.faces})
        rows.append(row)
    if faces:
        _write_text(_part(folder, start, FACES), "".join(json.dumps(row) + "\n" for row in faces))
    _write_text(_part(folder, start, METADATA), "".join(json.dumps(row) + "\n" for row in rows))


def _write_picture(path: Path, pixels: np.ndarray, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape[:2]
    Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes()).save(path, optimize=False)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write drawn scenes as a folder of pictures with metadata.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--count", type=int, required=True, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw")
    given = parser.parse_args(arguments)
    print(write_dataset(given.kind, given.out, given.count, seed=given.seed, jobs=given.jobs))


if __name__ == "__main__":
    main()
