"""Measure how many steps the tiny family needs, by sampler.

    python -m stable_cascade_nodes.tiny.evaluate_steps --out docs/tiny/steps.md

Stage C is read through the previewer, for prompts that leave the place of the object open and for prompts of two
objects; Stage B through the whole chain, for one object. ``--lora FILE`` measures a LoRA for few steps too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cascade_ops.adapters.dialects import read_lora
from ..cascade_ops.adapters.lora import apply_lora
from ..cascade_ops.handles import load_stage
from .captions import caption_full, unplaced
from .drawing import Scene
from .evaluate import BATCH, Family, as_pictures, measured_scenes, shares
from .family import IMAGE_SIZE, WEIGHTS

SEED = 8_000
# Sampler, steps, with guidance.
STAGE_C = (
    ("ddpm", 20, True),
    ("ddpm", 20, False),
    ("ddpm", 8, True),
    ("ddpm", 4, True),
    ("ddpm", 4, False),
    ("dpmpp_2m", 8, True),
    ("dpmpp_2m", 4, True),
    ("lcm", 8, True),
    ("lcm", 8, False),
    ("lcm", 4, True),
    ("lcm", 4, False),
    ("lcm", 2, True),
    ("lcm", 2, False),
)
# With a LoRA for few steps.
WITH_LORA = (("lcm", 8, False), ("lcm", 4, False), ("lcm", 4, True), ("lcm", 2, False))
STAGE_B = (("lcm", 10), ("lcm", 5), ("lcm", 3), ("ddpm", 10), ("ddpm", 5), ("ddpm", 3), ("dpmpp_2m", 5))


@torch.inference_mode()
def previewed(family: Family, latent: Tensor) -> np.ndarray:
    """What the previewer makes of Stage C latents, uint8 ``[B, 256, 256, 3]``."""
    return as_pictures(F.interpolate(family.previewer(latent), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear"))


def with_lora(weights: Path, family: Family, path: Path) -> Family:
    """The family with the LoRA on Stage C; its defaults stay."""
    handle = load_stage(weights / "stage_c.safetensors", "stage_c", dtype="float32")
    return replace(family, stage_c=apply_lora(handle, read_lora(path))[0].module)


def read_stage_c(family: Family, scenes: Sequence[Scene], prompts: Sequence[str], **changes) -> dict[str, float]:
    """Shares of the previews of Stage C's latents."""
    parts = [
        previewed(family, family.sample_c(prompts[start : start + BATCH], SEED + start, **changes))
        for start in range(0, len(prompts), BATCH)
    ]
    return shares(scenes, np.concatenate(parts))


def stage_c_rows(family: Family, ways: Sequence[tuple[str, int, bool]], count: int, lora: str = "") -> Iterator[str]:
    """A line of the table per way of sampling. lora: what the line says of the LoRA that the family has."""
    one, two = measured_scenes(count, "test", 1), measured_scenes(count, "test", 2)
    for sampler, steps, guided in ways:
        changes = {"sampler": sampler, "steps": steps, "guidance": family.defaults_c["guidance"] if guided else 1.0}
        left_open = read_stage_c(family, one, [unplaced(scene) for scene in one], **changes)["colour and shape"]
        whole = read_stage_c(family, two, [caption_full(scene) for scene in two], **changes)["all"]
        cells = [sampler, steps, f"{changes['guidance']:g}", lora, steps * (2 if guided else 1)]
        yield f"| {' | '.join(map(str, cells))} | {left_open:.2f} | {whole:.2f} |"


def stage_b_rows(family: Family, count: int) -> Iterator[str]:
    scenes = measured_scenes(count, "test", 1)
    prompts = [caption_full(scene) for scene in scenes]
    starts = range(0, count, BATCH)
    latents = [family.sample_c(prompts[start : start + BATCH], SEED + start) for start in starts]
    for sampler, steps in STAGE_B:
        made = [
            family.decode(family.sample_b(latent, prompts[s : s + BATCH], SEED + s, sampler=sampler, steps=steps))
            for s, latent in zip(starts, latents, strict=True)
        ]
        read = shares(scenes, np.concatenate(made))
        yield f"| {sampler} | {steps} | {read['colour and shape']:.2f} | {read['all']:.2f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure samplers and step counts on the tiny family.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with the parts of the family")
    parser.add_argument("--lora", type=Path, help="a LoRA for few steps, to measure the family with it too")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind; a quarter as many for Stage B")
    parser.add_argument("--out", type=Path, help="file for the tables")
    given = parser.parse_args(arguments)
    family = Family.load(given.weights)
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say("| sampler of Stage C | steps | guidance | LoRA | model runs | place left open | two objects |")
    say("|" + " --- |" * 7)
    for row in stage_c_rows(family, STAGE_C, given.count):
        say(row)
    if given.lora:
        for row in stage_c_rows(with_lora(given.weights, family, given.lora), WITH_LORA, given.count, "yes"):
            say(row)
    say("")
    say("| sampler of Stage B | steps | colour and shape | all |")
    say("|" + " --- |" * 4)
    for row in stage_b_rows(family, max(1, given.count // 4)):
        say(row)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
