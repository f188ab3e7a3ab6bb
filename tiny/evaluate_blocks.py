"""Measure which attention blocks of Stage C take what from the picture that an IP-Adapter shows.

    python -m stable_cascade_nodes.tiny.evaluate_blocks --out docs/tiny/ip_adapter_blocks.md

The adapter acts in some of the four groups of blocks (see `attachments.attention_groups`) at weight 1, and the prompt
is empty. Figures are shares of pictures that have the reference picture's background (pattern and colours) and its
object's colour and shape. Where two pictures are read, one in the first group and one in the others, the background
counts that is the first one's and the object that is the second one's. In the last rows a prompt names another object
and no background: the background counts that is the picture's and the object that is the prompt's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..cascade_ops.attachments import attention_groups
from ..cascade_ops.checkpoints import load
from ..cascade_ops.denoisers import SteppedAdapter
from ..cascade_ops.models import IPAdapter
from .captions import object_phrase
from .drawing import Scene
from .evaluate import BATCH, Family, contact_sheet, measured_scenes, shares
from .family import WEIGHTS
from .measuring import SEED, chain, drawn

Groups = tuple[float, float, float, float]

EVERYWHERE: Groups = (1, 1, 1, 1)
# For the blocks on the way down of the outer level, of the inner one, and on the way up of the inner, of the outer.
ROWS: dict[str, Groups] = {
    "none": (0, 0, 0, 0),
    "all": EVERYWHERE,
    "down_outer": (1, 0, 0, 0),
    "down_inner": (0, 1, 0, 0),
    "up_inner": (0, 0, 1, 0),
    "up_outer": (0, 0, 0, 1),
    "all but down_outer": (0, 1, 1, 1),
}
TWO = "one in down_outer, another in the rest"
PROMPTED = {"none, with a prompt for the object": "none", "all, with a prompt for the object": "all"}
COLUMNS = ("background", "colour", "shape")


def read_in(
    family: Family,
    adapter: IPAdapter,
    references: Sequence[tuple[Sequence[Scene], Groups]],
    prompts: Sequence[str],
) -> np.ndarray:
    """Pictures of 256 x 256, each reading one picture of every reference in its groups of blocks."""
    shown = []
    for scenes, groups in references:
        parts = np.array_split(drawn(scenes), -(-len(prompts) // BATCH))
        counts = attention_groups(family.stage_c)
        weights = [weight for weight, blocks in zip(groups, counts, strict=True) for _ in range(blocks)]
        shown.append((torch.cat([family.embed(part) for part in parts]), weights))

    def attach(start: int, stop: int) -> dict:
        return {"adapters": [SteppedAdapter(adapter, embeddings[start:stop], weights) for embeddings, weights in shown]}

    return chain(family, prompts, SEED, attach)


def measure(weights: Path, count: int, samples: Path | None = None) -> dict[str, dict[str, float]]:
    """The shares of every row, by its name."""
    family = Family.load(weights)
    adapter, _ = load(weights / "ip_adapter.safetensors", expect="ip_adapter", dtype=torch.float32)
    scenes = measured_scenes(2 * count, "test", 1)
    scenes, others = scenes[:count], scenes[count:]
    prompts = [""] * count
    made = {name: read_in(family, adapter, [(scenes, groups)], prompts) for name, groups in ROWS.items()}
    results = {name: shares(scenes, pictures) for name, pictures in made.items()}
    made[TWO] = read_in(family, adapter, [(scenes, ROWS["down_outer"]), (others, ROWS["all but down_outer"])], prompts)
    prompts = [object_phrase(scene.objects[0]) for scene in others]
    for name, groups in PROMPTED.items():
        made[name] = read_in(family, adapter, [(scenes, ROWS[groups])], prompts)
    for name in (TWO, *PROMPTED):
        results[name] = shares(others, made[name]) | {"background": shares(scenes, made[name])["background"]}
    if samples is not None:
        shown = [picture for group in (drawn(scenes), drawn(others), *made.values()) for picture in group[:8]]
        contact_sheet(shown, min(8, count)).save(samples, quality=90)
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table."""
    lines = ["| the picture is read in | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    for name, found in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{found[column]:.2f}" for column in COLUMNS) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure what each group of blocks takes from an IP-Adapter's picture."
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with the parts of the family")
    parser.add_argument("--count", type=int, default=50, help="pictures of each kind")
    parser.add_argument("--samples", type=Path, help="file for a contact sheet: the references, then one row per line")
    parser.add_argument("--out", type=Path, help="file for the table")
    given = parser.parse_args(arguments)
    text = table(measure(given.weights, given.count, given.samples))
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
