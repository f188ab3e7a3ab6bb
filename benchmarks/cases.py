"""The list of cases: a name for the command line, a title for the table, how it is built, what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from .comparing import Sides
from .models import CONFIGS, without_memory
from .pipeline_cases import text_to_image
from .stage_cases import Setting, stage_a_decode, stage_b_step, stage_c_step
from .start_cases import FOR_PICTURES, importing, load_file, load_folder

# Beside the weights: Python, two libraries, activations.
_BESIDE_WEIGHTS = 3 * 2**30
_TEXT_ENCODER_WEIGHTS = 695_000_000


@dataclass(frozen=True)
class Case:
    """weights: which stages and sizes it holds in memory, and how often. repeats: how often it is timed, where fewer
    are enough. target: how many times faster than diffusers it is meant to be. computes: in the process that is
    measured, on the device. check_in_float32: that both agree, since rounding adds up over a run."""

    name: str
    title: str
    build: Callable[[Setting], Sides]
    weights: tuple[tuple[str, str], ...] = ()
    text_encoder: bool = False
    repeats: int = 100
    target: float | None = None
    computes: bool = True
    check_in_float32: bool = False

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """About how much memory it takes."""
        count = sum(_parameters(*each) for each in self.weights) + self.text_encoder * _TEXT_ENCODER_WEIGHTS
        return count * dtype.itemsize + _BESIDE_WEIGHTS if count else 0


def _parameters(stage: str, size: str) -> int:
    return sum(prod(tensor.shape) for tensor in without_memory(stage, CONFIGS[stage][size]).parameters())


_C_LITE, _B_LITE, _A = ("stage_c", "lite"), ("stage_b", "lite"), ("stage_a", "full")
_C_FULL, _B_FULL = ("stage_c", "full"), ("stage_b", "full")
_CHAIN_LITE, _CHAIN_FULL = (_C_LITE, _B_LITE, _A), (_C_FULL, _B_FULL, _A)

_ALL = (
    Case(
        "stage_c_lite_step",
        "Stage C 1B lite, guided step, 24 x 24",
        partial(stage_c_step, "lite", 1),
        (_C_LITE,),
        target=1.2,
    ),
    Case(
        "stage_c_lite_step_4",
        "Stage C 1B lite, guided step, 24 x 24, batch 4",
        partial(stage_c_step, "lite", 4),
        (_C_LITE,),
        repeats=3,
    ),
    Case("stage_c_full_step", "Stage C 3.6B, guided step, 24 x 24", partial(stage_c_step, "full", 1), (_C_FULL,)),
    Case(
        "stage_b_lite_step",
        "Stage B 700M lite, step without guidance, 256 x 256",
        partial(stage_b_step, "lite", 1, False),
        (_B_LITE,),
        target=1.2,
    ),
    Case(
        "stage_b_lite_guided_step",
        "Stage B 700M lite, guided step, 256 x 256",
        partial(stage_b_step, "lite", 1, True),
        (_B_LITE,),
    ),
    Case(
        "stage_b_lite_step_4",
        "Stage B 700M lite, step without guidance, 256 x 256, batch 4",
        partial(stage_b_step, "lite", 4, False),
        (_B_LITE,),
        repeats=3,
    ),
    Case(
        "stage_b_full_step",
        "Stage B 1.5B, step without guidance, 256 x 256",
        partial(stage_b_step, "full", 1, False),
        (_B_FULL,),
    ),
    Case("stage_a_1024", "Stage A, decoding of 1024 x 1024", partial(stage_a_decode, 1024), (_A,), target=1.7),
    Case("stage_a_2048", "Stage A, decoding of 2048 x 2048", partial(stage_a_decode, 2048), (_A,), repeats=3),
    Case("text_to_image_tiny", "Text to image, tiny family, 256 x 256", partial(text_to_image, "tiny", 1), target=1.8),
    Case("text_to_image_tiny_4", "Text to image, tiny family, 256 x 256, batch 4", partial(text_to_image, "tiny", 4)),
    Case(
        "text_to_image_lite",
        "Text to image, lite sizes, 1024 x 1024",
        partial(text_to_image, "lite", 1),
        _CHAIN_LITE,
        text_encoder=True,
        check_in_float32=True,
        repeats=3,
    ),
    Case(
        "text_to_image_lite_4",
        "Text to image, lite sizes, 1024 x 1024, batch 4",
        partial(text_to_image, "lite", 4),
        _CHAIN_LITE,
        text_encoder=True,
        check_in_float32=True,
        repeats=1,
    ),
    Case(
        "text_to_image_full",
        "Text to image, full sizes, 1024 x 1024",
        partial(text_to_image, "full", 1),
        _CHAIN_FULL,
        text_encoder=True,
        check_in_float32=True,
        repeats=3,
    ),
    Case(
        "load_stage_c_lite",
        "Loading Stage C 1B lite, a folder as diffusers saves it",
        partial(load_folder, "stage_c", "lite"),
        (_C_LITE, _C_LITE),
    ),
    Case(
        "load_stage_c_lite_file",
        "Loading Stage C 1B lite, a single file as published",
        partial(load_file, "stage_c", "lite"),
        (_C_LITE, _C_LITE),
    ),
    Case(
        "import",
        "Import over torch: this pack, the two pipelines of diffusers",
        partial(importing, "", "meant to be under 0.3 s"),
        computes=False,
    ),
    Case(
        "import_all",
        "Import over torch of all that makes a picture",
        partial(importing, FOR_PICTURES, "what the pack imports when it is used, too"),
        computes=False,
    ),
)
CASES = {case.name: case for case in _ALL}


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these names, all of them for none; ValueError for an unknown one."""
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"There is no case {unknown[0]!r}: choose out of {', '.join(CASES)}.")
    return [CASES[name] for name in names] or list(_ALL)
