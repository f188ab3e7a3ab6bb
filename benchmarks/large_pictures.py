"""What large pictures cost and what goes wrong in them: the figures of `docs/high_resolution.md`.

    python -m stable_cascade_nodes.benchmarks.large_pictures memory [--sides 1024 2048]
    python -m stable_cascade_nodes.benchmarks.large_pictures objects [--prompts 12]

`memory` runs Stage B and Stage A on the CPU with random weights, as a whole and in parts, each in a process of its own,
and prints how far its peak resident memory grew, beside what `cascade_ops.memory` reserves for it and for the published
weights in bfloat16. Stage B has the lite model's depth and a quarter of its width, and runs one guided step; Stage A is
half as wide as the published one.

`objects` asks the tiny family for one object at several compressions and counts the pictures that show one.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from ..cascade_ops import memory, stages
from ..cascade_ops.checkpoints.loading import ParametersWithoutMemory
from ..cascade_ops.denoisers import StageBDenoiser
from ..cascade_ops.handles import StageHandle
from ..cascade_ops.models import StageA, StageB
from ..cascade_ops.pipeline import CascadePipeline
from ..cascade_ops.sizes import stage_b_size, stage_c_size
from ..cascade_ops.tiles import tiled_decode
from ..cascade_ops.windows import WindowedStageB, windows_of
from ..tiny.checker import read_picture
from .load_memory import peak_bytes

_DEPTH: dict[str, Any] = {"blocks": [[2, 4, 14, 4], [4, 14, 4, 2]], "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]]}
_LITE: dict[str, Any] = {**_DEPTH, "c_hidden": [320, 576, 1152, 1152], "nhead": [-1, 9, 18, 18]}
_QUARTER: dict[str, Any] = {**_DEPTH, "c_hidden": [80, 144, 288, 288], "nhead": [-1, -1, 18, 18]}
_HALF: dict[str, Any] = {"c_hidden": 192}
_PARTS = {"stage_b": (0, 1024), "stage_a": (0, 512)}
# Stage A as a whole needs more than most machines have beyond this.
_LARGEST_WHOLE = 1024

_WIDTH, _HEIGHT = 512, 384
_COMPRESSIONS = (0.0, 64.0, 85.34)


def _handle(stage: str, published: bool) -> StageHandle:
    if published:
        with ParametersWithoutMemory():
            module = StageB(**_LITE) if stage == "stage_b" else StageA()
        module = module.to("meta", torch.bfloat16)
    else:
        module = StageB(**_QUARTER) if stage == "stage_b" else StageA(**_HALF)
    return StageHandle(stage, module.eval().requires_grad_(False), SimpleNamespace(title=stage), "random")


def _reserved(handle: StageHandle, side: int, part: int) -> int:
    shape = (1, 4, *stage_b_size(side, side))
    if handle.stage == "stage_a":
        return memory.decoding_bytes(handle, shape, part)
    largest = windows_of(handle.module, shape[2:], part).largest
    return memory.sampling_bytes(handle, shape, handle.module.c_clip_seq, largest=largest)


def _measure(stage: str, side: int, part: int) -> None:
    """In the child: print by how many bytes the peak grew while the stage ran, and the seconds that it took."""
    torch.manual_seed(0)
    module = _handle(stage, published=False).module
    latent = torch.randn(1, 4, *stage_b_size(side, side))
    prior = torch.randn(1, 16, *stage_c_size(side, side))
    before, start = peak_bytes(), time.perf_counter()
    with torch.no_grad():
        if stage == "stage_a":
            tiled_decode(module, latent, part)
        else:
            model = WindowedStageB(module, part) if 0 < part < side else module
            denoiser = StageBDenoiser(model, prior, torch.zeros(1, 1, 1280), torch.zeros(1, 1, 1280))
            denoiser.prepare(torch.tensor([0.5]), latent.shape, guided=True)(latent, 0, True)
    print(peak_bytes() - before, time.perf_counter() - start)


def _memory(sides: list[int]) -> None:
    print("| stage | picture | part | measured | reserved for it | reserved for the published one | seconds |")
    print("|---|---|---|---|---|---|---|")
    for stage, side in itertools.product(_PARTS, sides):
        for part in _PARTS[stage]:
            if part >= side or (stage == "stage_a" and not part and side > _LARGEST_WHOLE):
                continue
            command = [sys.executable, "-m", __spec__.name, "child", stage, str(side), str(part)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            grown, seconds = (float(word) for word in answer.split())
            reserved = [_reserved(_handle(stage, published), side, part) for published in (False, True)]
            figures = " | ".join(f"{figure / 1e9:.2f} GB" for figure in (grown, *reserved))
            name = "Stage B" if stage == "stage_b" else "Stage A"
            print(f"| {name} | {side} x {side} | {part or 'whole'} | {figures} | {seconds:.0f} |", flush=True)


def _objects(count: int) -> None:
    pipeline = CascadePipeline.load("tiny")
    negative = stages.encode_text(pipeline.text_encoder, "")
    scenes = zip(
        itertools.product(("circle", "square", "triangle", "ring"), ("red", "yellow", "white")),
        itertools.cycle(("blue", "green", "black")),
        strict=False,
    )
    asked = [(shape, colour, behind) for (shape, colour), behind in scenes][:count]
    print("| compression | Stage C | one object, of the right colour |")
    print("|---|---|---|")
    for compression in _COMPRESSIONS:
        right = 0
        for seed, (shape, colour, behind) in enumerate(asked):
            prompt = stages.encode_text(pipeline.text_encoder, f"a {colour} {shape} on a {behind} background")
            latent = stages.empty_latent(pipeline.stage_c, _WIDTH, _HEIGHT, compression=compression)
            latent = stages.sample_stage_c(
                pipeline.stage_c, prompt, negative, latent, seed=seed, settings=stages.SamplingSettings()
            )
            detail = stages.sample_stage_b(
                pipeline.stage_b, latent, prompt, negative, seed=seed, settings=stages.SamplingSettings(steps=10)
            )
            found = read_picture(stages.decode_stage_a(pipeline.stage_a, detail)[0].numpy()).objects
            right += [each.colour for each in found] == [colour]
        rows, columns = stage_c_size(_HEIGHT, _WIDTH, compression)
        print(f"| {compression or 42.67:g} | {columns} x {rows} | {right} of {len(asked)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("memory").add_argument("--sides", type=int, nargs="+", default=[1024, 2048])
    commands.add_parser("objects").add_argument("--prompts", type=int, default=12)
    child = commands.add_parser("child")
    child.add_argument("stage", choices=_PARTS)
    child.add_argument("side", type=int)
    child.add_argument("part", type=int)
    arguments = parser.parse_args()
    if arguments.command == "child":
        _measure(arguments.stage, arguments.side, arguments.part)
    elif arguments.command == "memory":
        _memory(arguments.sides)
    else:
        _objects(arguments.prompts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
