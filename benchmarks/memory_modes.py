"""How much memory the whole chain takes, by memory mode.

    python -m stable_cascade_nodes.benchmarks.memory_modes plan [--rate 12] [--taken 1]
    python -m stable_cascade_nodes.benchmarks.memory_modes measure [--family full] [--dtype bfloat16] [--side 1024]

`plan` computes, from the published shapes alone, what stays on a card and what is streamed to it, for cards of 4 to
24 GB. Its seconds are a prediction: bytes over the given rate in GB/s, for a step that hides all of its computing
behind the copies. Nothing is measured.

`measure` writes files of random weights, makes a picture with one step of Stage C and one of Stage B in a process of
its own for each mode, and prints the growth of that process's peak memory from before the models are loaded: resident
memory on a CPU, PyTorch's peak on a GPU. The peak does not depend on the number of steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..cascade_ops import memory
from ..cascade_ops.checkpoints.loading import ParametersWithoutMemory
from ..cascade_ops.checkpoints.saving import write_tensors
from ..cascade_ops.handles import StageHandle
from ..cascade_ops.models import StageA, StageB, StageC
from ..cascade_ops.pipeline import CascadePipeline
from ..cascade_ops.residency import MARGIN, MODES
from ..cascade_ops.streaming_plan import StreamingPlan, make_plan
from .load_memory import peak_bytes

CARDS = (4, 6, 8, 12, 16, 24)
# The keyword arguments of the models, and the width and depth of the text encoder, by family. The text encoder's heads
# are 64 wide, as the published one's.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"stage_c": {}, "stage_b": {}, "stage_a": {}, "text_encoder": {"width": 1280, "depth": 32}},
    "lite": {
        "stage_c": {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]},
        "stage_b": {
            "c_hidden": [320, 576, 1152, 1152],
            "nhead": [-1, 9, 18, 18],
            "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
            "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
        },
        "stage_a": {},
        "text_encoder": {"width": 1280, "depth": 32},
    },
    "small": {
        "stage_c": {"c_cond": 256, "c_hidden": [256, 256], "nhead": [4, 4], "blocks": [[2, 4], [4, 2]]},
        "stage_b": {
            "c_hidden": [64, 64, 128, 128],
            "nhead": [-1, -1, 2, 2],
            "blocks": [[1, 1, 2, 1], [1, 2, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
        },
        "stage_a": {"c_hidden": 64, "bottleneck_blocks": 4},
        "text_encoder": {"width": 1280, "depth": 1},
    },
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MODELS = {"stage_c": StageC, "stage_b": StageB, "stage_a": StageA}
_PICTURES = {"stage_c": (16, 24, 24), "stage_b": (4, 256, 256)}


def shapes_only(stage: str, family: str = "full") -> torch.nn.Module:
    """A model of a family without memory for its weights."""
    with ParametersWithoutMemory():
        return _MODELS[stage](**FAMILIES[family][stage])


def running_bytes(stage: str, model: torch.nn.Module) -> int:
    """What a guided step for one picture of 1024 x 1024 needs beside the weights, with a prompt of 75 tokens."""
    handle = StageHandle(stage, model, SimpleNamespace(title=stage), stage)  # type: ignore[arg-type]
    tokens = 77 + 2 * model.c_clip_seq if stage == "stage_c" else model.c_clip_seq
    return memory.sampling_bytes(handle, (1, *_PICTURES[stage]), tokens)


def plan_for(stage: str, card: float, taken: float) -> tuple[int, StreamingPlan | None]:
    """Bytes for the weights on a card of `card` GiB of which `taken` GB are in use, and the plan where they do not fit.

    In bfloat16. Raises ValueError where they cannot even be streamed.
    """
    model = shapes_only(stage).to("meta", torch.bfloat16)
    budget = int(card * 2**30 - taken * 1e9) - MARGIN - running_bytes(stage, model)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return budget, None if weights <= budget else make_plan(model, budget)


def _plan(rate: float, taken: float) -> None:
    print(f"bfloat16, 1024 x 1024; {taken:g} GB of the card in use by others; predicted at {rate:g} GB/s")
    print("| stage | card | weights | stays | streamed per step | per run besides | predicted seconds per step |")
    print("|---|---|---|---|---|---|---|")
    for stage, name in (("stage_c", "Stage C 3.6B"), ("stage_b", "Stage B 1.5B")):
        weights = sum(p.numel() for p in shapes_only(stage).parameters()) * 2
        for card in CARDS:
            try:
                _, plan = plan_for(stage, card, taken)
            except ValueError:
                figures = ["does not fit", "", "", ""]
            else:
                if plan is None:
                    figures = ["all", "0", "0", "as resident"]
                else:
                    sizes = (plan.resident, plan.per_step, plan.once)
                    figures = [f"{size / 1e9:.2f} GB" for size in sizes] + [f"{plan.per_step / 1e9 / rate:.2f}"]
            print(f"| {name} | {card} GB | {weights / 1e9:.2f} GB | {' | '.join(figures)} |")


def write_family(folder: Path, family: str, dtype: torch.dtype) -> dict[str, int]:
    """Write random weights, a tensor at a time, and return the bytes of each stage's."""
    sizes = {}
    for stage, settings in FAMILIES[family].items():
        model = _text_model(**settings) if stage == "text_encoder" else shapes_only(stage, family)
        kept = dtype if stage != "stage_a" else torch.float32
        entries = {}
        for name, tensor in model.state_dict().items():
            shape = tuple(tensor.shape)
            stored = kept if tensor.is_floating_point() else tensor.dtype
            entries[name] = (stored, shape, lambda shape=shape, stored=stored: _random(shape, stored))
        write_tensors(folder / f"{stage}.safetensors", entries, {"format": "pt"})
        sizes[stage] = sum(prod(shape) * stored.itemsize for stored, shape, _ in entries.values())
    return sizes


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape).mul_(0.02).to(dtype)


def _text_model(width: int, depth: int) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64,
        projection_dim=width, vocab_size=49408, hidden_act="gelu",
    )  # fmt: skip
    with ParametersWithoutMemory():
        return CLIPTextModelWithProjection(config)


def _measure(folder: Path, mode: str, dtype: str, side: int) -> None:
    """In the child: print by how many bytes the peak grew, and the seconds that it took."""
    from ..cascade_ops import text

    text.default_tokenizer()
    on_gpu = torch.cuda.is_available()
    files = {stage: folder / f"{stage}.safetensors" for stage in FAMILIES["full"]}
    before, start = peak_bytes(), time.perf_counter()
    pipeline = CascadePipeline.load(files, dtype=dtype, memory=mode)
    pipeline.generate("a large red circle", width=side, height=side, steps_c=1, steps_b=1)
    grown = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes() - before
    print(grown, time.perf_counter() - start)


def _table(families: list[str], dtypes: list[str], sides: list[int], folder: str | None) -> None:
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    modes = [mode for mode in MODES if mode != "auto" and (on_gpu or mode != "streamed")]
    print(f"{where}; growth of the {'memory that PyTorch took there' if on_gpu else 'peak resident memory'}")
    print("| family | dtype | picture | mode | all weights | the largest stage | peak | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for family in families:
        for dtype in dtypes:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                sizes = write_family(Path(place), family, DTYPES[dtype])
                for side in sides:
                    for mode in modes:
                        child = [place, mode, dtype, str(side)]
                        command = [sys.executable, "-m", __spec__.name, "child", *child]
                        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                        grown, seconds = (float(word) for word in answer.split()[-2:])
                        weights = sum(sizes.values()), max(sizes.values()), grown
                        cells = [family, dtype, f"{side} x {side}", mode]
                        cells += [*(f"{figure / 1e9:.2f} GB" for figure in weights), f"{seconds:.0f}"]
                        print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what would stay on cards of 4 to 24 GB, from the shapes alone")
    plan.add_argument("--rate", type=float, default=12.0, help="GB/s from main memory to the card (default: 12)")
    plan.add_argument("--taken", type=float, default=1.0, help="GB of the card that others use (default: 1)")
    measure = commands.add_parser("measure", help="peak memory of a whole picture, by mode")
    measure.add_argument("--family", nargs="+", choices=FAMILIES, default=["full", "lite"])
    measure.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    measure.add_argument("--side", type=int, nargs="+", default=[1024], help="pixels (default: 1024)")
    measure.add_argument("--folder", help="where to write the files, up to 12 GB (default: the temporary folder)")
    child = commands.add_parser("child")
    child.add_argument("folder", type=Path)
    child.add_argument("mode", choices=MODES)
    child.add_argument("dtype", choices=DTYPES)
    child.add_argument("side", type=int)
    arguments = parser.parse_args(argv)
    if arguments.command == "plan":
        _plan(arguments.rate, arguments.taken)
    elif arguments.command == "child":
        _measure(arguments.folder, arguments.mode, arguments.dtype, arguments.side)
    else:
        _table(arguments.family, arguments.dtype, arguments.side, arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
