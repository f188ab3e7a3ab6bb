"""Render a pool of scenes once, so that every part of the family trains on the same pictures.

    python -m stable_cascade_nodes.tiny.pool --out DIR --count 30000 --seed 0
    python -m stable_cascade_nodes.tiny.pool --out DIR --count 2000 --seed 0 --split test

writes `DIR/<split>.npy` (uint8 [count, size, size, 3], to be memory-mapped) and `DIR/<split>.json` (a list of
`{"scene", "caption", "captions"}`: the scene as a dict, the canonical caption, a few random ones). Picture i depends
on the seed, the split and i alone; an interrupted run goes on with the chunks that are missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np

from .captions import caption, caption_full
from .drawing import SPLITS, Scene, random_scene, render

CAPTIONS_PER_SCENE = 4
_CHUNK = 250


def pool_scene(seed: int, split: str, index: int) -> tuple[Scene, list[str]]:
    """Scene number `index` of a pool and its random captions."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = random_scene(rng, split)
    return scene, [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]


def build_pool(directory: Path, count: int, *, seed: int = 0, split: str = "train", size: int = 256, jobs: int = 2):
    """Write the pictures and captions of a pool and return the two paths; existing complete pools are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures, captions = directory / f"{split}.npy", directory / f"{split}.json"
    if not captions.exists():
        entries = []
        for index in range(count):
            scene, texts = pool_scene(seed, split, index)
            entries.append({"scene": scene.to_dict(), "caption": caption_full(scene), "captions": texts})
        partial = captions.with_suffix(".json.partial")
        partial.write_text(json.dumps(entries), encoding="utf-8")
        os.replace(partial, captions)
    if not pictures.exists():
        partial = pictures.with_suffix(".npy.partial")
        if not partial.exists():
            np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, size, size, 3)).flush()
        work = [(partial, start, min(start + _CHUNK, count), seed, split, size) for start in range(0, count, _CHUNK)]
        with multiprocessing.get_context("spawn").Pool(jobs) as workers:
            for done, _ in enumerate(workers.imap_unordered(_render_chunk, work), start=1):
                if done % 20 == 0 or done == len(work):
                    print(f"{split}: {done} of {len(work)} chunks", flush=True)
        os.replace(partial, pictures)
        for item in work:
            _done_marker(*item[:2]).unlink(missing_ok=True)
    return pictures, captions


def open_pool(directory: Path, split: str = "train") -> tuple[np.ndarray, list[dict]]:
    """The memory-mapped pictures of a pool and its list of captions and scenes."""
    pictures = np.load(directory / f"{split}.npy", mmap_mode="r")
    entries = json.loads((directory / f"{split}.json").read_text(encoding="utf-8"))
    if len(pictures) != len(entries):
        raise ValueError(
            f"{directory / split}: {len(pictures)} pictures and {len(entries)} captions, expected as many of one as "
            "of the other: delete both files and render the pool again."
        )
    return pictures, entries


def _done_marker(partial: Path, start: int) -> Path:
    return partial.with_suffix(f".{start}.done")


def _render_chunk(work: tuple[Path, int, int, int, str, int]) -> None:
    partial, start, stop, seed, split, size = work
    marker = _done_marker(partial, start)
    if marker.exists():
        return
    pictures = np.load(partial, mmap_mode="r+")
    for index in range(start, stop):
        pictures[index] = render(pool_scene(seed, split, index)[0], size)
    pictures.flush()
    marker.touch()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Render a pool of pictures and captions for the tiny family.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the pool")
    parser.add_argument("--count", type=int, default=30_000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--jobs", type=int, default=2, help="processes that render")
    given = parser.parse_args(arguments)
    paths = build_pool(given.out, given.count, seed=given.seed, split=given.split, size=given.size, jobs=given.jobs)
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
