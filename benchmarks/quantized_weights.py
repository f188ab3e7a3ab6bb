"""What weights of 8 bits save, and what they change.

    python -m stable_cascade_nodes.benchmarks.quantized_weights [--count N]

Two tables in Markdown. Memory: bytes of the weights of the published sizes, from their shapes alone. Error: how far a
prediction of the tiny family is from that with its float32 weights, as a share of it (root mean square over all values
and noise levels), with some of the weights rounded and all else float32; then the whole models as they are loaded, and
how far their pictures are from those of the float32 weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..cascade_ops.catalog import bundled
from ..cascade_ops.handles import load_stage
from ..cascade_ops.pipeline import CascadePipeline
from ..cascade_ops.quantized import FORMATS, dequantized, is_matrix, matrices, quantized
from ..tiny.captions import caption_full
from ..tiny.evaluate import measured_scenes, psnr, shares
from .models import CONFIGS, without_memory

PUBLISHED = {
    "Stage C 3.6B": ("stage_c", "full"),
    "Stage C 1B lite": ("stage_c", "lite"),
    "Stage B 1.5B": ("stage_b", "full"),
    "Stage B 700M lite": ("stage_b", "lite"),
}
KINDS = {"int8": torch.int8, "float8 e4m3fn": torch.float8_e4m3fn, "float8 e5m2": torch.float8_e5m2}
LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
STEPS = {"steps_c": 12, "steps_b": 5}


def memory_rows() -> Iterator[list[str]]:
    """Gigabytes of the weights by what they are held in."""
    for title, (stage, size) in PUBLISHED.items():
        weights = without_memory(stage, CONFIGS[stage][size]).state_dict()
        counts = {name: weight.numel() for name, weight in weights.items()}
        total, small = sum(counts.values()), matrices(stage, counts)
        eight = sum(counts[name] for name in small)
        scales = 4 * sum(len(weights[name]) for name in small)
        sizes = [4 * total, 2 * total, eight + scales + 2 * (total - eight), eight + scales + 4 * (total - eight)]
        yield [title, f"{total:,}", f"{eight / total:.1%}", *(f"{size / 1e9:.2f}" for size in sizes)]


def groups(stage: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Weights to round, by what they are called in the table."""
    names = list(names)
    every = [name for name in names if is_matrix(name)]
    found = {"matrices": matrices(stage, names)}
    if stage == "stage_c":
        found["matrices of the last level alone"] = [name for name in every if name not in found["matrices"]]
        found["matrices and those of the last level"] = every
    for what, words in (
        ("output layer alone", ("clf.",)),
        ("embedding alone", ("embedding.",)),
        ("timestep mappers alone", (".mapper", ".mapper_")),
        ("condition mappers alone", ("clip_", "effnet_mapper", "pixels_mapper")),
        ("resampling alone", ("_downscalers.", "_upscalers.")),
    ):
        some = [name for name in names if name.endswith("weight") and any(word in f".{name}" for word in words)]
        found[what] = [name for name in some if not is_matrix(name)]
    return {what: some for what, some in found.items() if some}


@torch.no_grad()
def rounded(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> nn.Module:
    """A copy with some weights as they come back from 8 bits; float8 with a scale for each row too."""
    changed = copy.deepcopy(model)
    for name in names:
        weight = changed.get_parameter(name)
        flat = weight.flatten(1)
        weight.copy_(dequantized(*quantized(flat, dtype), torch.float32).view_as(weight))
    return changed


def cases(stage: str, model: nn.Module) -> list[Callable[[nn.Module], Tensor]]:
    """Predictions of noisy latents with random conditions, one for each noise level."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given: dict[str, Tensor]
    if stage == "stage_c":
        x, given = randn(4, 16, 8, 8), {"clip_text": randn(4, 77, 128), "clip_text_pooled": randn(4, 1, 128)}
    else:
        x, given = randn(4, 4, 64, 64), {"effnet": randn(4, 16, 8, 8), "clip": randn(4, 1, 128)}
    return [lambda one, level=level: one(x, torch.full((4,), level), **given) for level in LEVELS]


@torch.no_grad()
def error(stage: str, exact: nn.Module, other: nn.Module) -> float:
    """Root mean square of the difference over that of the predictions."""
    pairs = [(run(other), run(exact)) for run in cases(stage, exact)]
    squares = [((found - wanted).square().sum().item(), wanted.square().sum().item()) for found, wanted in pairs]
    return (sum(first for first, _ in squares) / sum(second for _, second in squares)) ** 0.5


def error_rows() -> Iterator[list[str]]:
    for stage in ("stage_c", "stage_b"):
        exact = load_stage(bundled(stage).path, stage, dtype="float32").module
        counts = {name: weight.numel() for name, weight in exact.named_parameters()}
        for what, names in groups(stage, counts).items():
            share = sum(counts[name] for name in names) / sum(counts.values())
            errors = [error(stage, exact, rounded(exact, names, dtype)) for dtype in KINDS.values()]
            yield [f"Stage {stage[-1].upper()}", what, f"{share:.1%}", *(f"{each:.4f}" for each in errors)]


def random_rows(size: int = 1024) -> Iterator[list[str]]:
    """The error of random rows themselves, as a share of them."""
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(size, size, generator=generator)
    heavy = normal / (torch.rand(size, size, generator=generator) + 0.02)
    for what, weight in (("normal", normal), ("heavy-tailed", heavy)):
        found = []
        for dtype in KINDS.values():
            difference = dequantized(*quantized(weight, dtype), torch.float32) - weight
            found.append(f"{(difference.norm() / weight.norm()).item():.4f}")
        yield [what, f"{(weight.abs().max() / weight.abs().median()).item():.0f}", *found]


def picture_rows(count: int) -> Iterator[list[str]]:
    """Pictures of the tiny family: the same prompts and seeds with each kind of weights."""
    scenes = measured_scenes(count, "test", 1)
    exact = None
    for choice in ("float32", "bfloat16", *FORMATS):
        pipeline = CascadePipeline.load("tiny", device="cpu", dtype=choice)
        made = [pipeline.generate(caption_full(scene), seed=n, **STEPS)[0] for n, scene in enumerate(scenes)]
        pictures = np.stack([np.asarray(picture) for picture in made])
        exact = pictures if exact is None else exact
        right = shares(scenes, pictures)
        size = pipeline.stage_c.size_in_bytes + pipeline.stage_b.size_in_bytes
        same = "" if pictures is exact else f"{psnr(pictures, exact):.1f}"
        yield [choice, f"{size / 1e6:.1f}", same, f"{right['colour and shape']:.2f}", f"{right['all']:.2f}"]


def table(head: list[str], rows: Iterable[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="pictures of the tiny family for each kind of weights")
    count = parser.parse_args(arguments).count
    held = ["float32", "bfloat16", "8 bits, rest bfloat16", "8 bits, rest float32"]
    table(["weights in GB", "parameters", "in 8 bits", *held], memory_rows())
    table(["random rows", "largest / median", *KINDS], random_rows())
    table(["tiny family", "rounded", "of its weights", *KINDS], error_rows())
    table(
        ["pictures with", "MB of Stages C and B", "PSNR to float32, dB", "colour and shape", "all"], picture_rows(count)
    )


if __name__ == "__main__":
    main()
