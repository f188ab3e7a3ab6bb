"""Approximations that save time, beside the exact picture."""

from __future__ import annotations

from dataclasses import replace

from ..layout import Column, Node, Shot, Workflow
from .parts import FILES, MODELS, decode, prompt, sample_b, sample_c, save, size

_NOTE = f"""\
# Stage B in less time

An **approximation**. The inner blocks of Stage B change little from step to step; *reuse inner blocks* computes them in
every second step and takes what they gave for the step after. With the release that leaves out four of ten operations.
The second picture is exact, from the same seed, to compare.

**Change first:** `every` (more is faster and further from the exact picture), then `outer_levels` (1 is faster; 3
hardly changes the picture and hardly saves anything). When you are content, delete the exact half.

{FILES}"""
_REUSE, _FAST, _EXACT = 10, 12, 15


def _sampled(id: int, title: str, **others: object) -> Node:
    return replace(sample_b(id, 9, 6, 7, **others), title=title)


FAST_STAGE_B = Workflow(
    "fast_stage_b",
    _NOTE,
    (
        MODELS,
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a large green cross on the left on a white background"),
                prompt(7, "Negative prompt", ""),
                size(8),
                Node(_REUSE, "CascadeReuseInnerBlocks", {"stage_b": (3, 0)}, said=True),
            ),
            "text",
            width=360,
        ),
        Column("Stage C: what is seen", (sample_c(9, 6, 7, 8),), "stage_c"),
        Column(
            "Stage B: detail, approximated",
            (_sampled(11, "Sample Stage B, reusing inner blocks", stage_b=(_REUSE, 0)),),
            "stage_b",
            width=320,
        ),
        Column("Stage B: detail, exact", (_sampled(13, "Sample Stage B, exact"),), "stage_b", width=320),
        Column(
            "Stage A: both pictures",
            (
                decode(14, 11),
                save(_FAST, 14, "cascade_fast", "Approximated", 300),
                decode(16, 13),
                save(_EXACT, 16, "cascade_exact", "Exact", 300),
            ),
            "stage_a",
            width=300,
        ),
    ),
    shots=(
        Shot("Exact", _EXACT),
        Shot("Inner blocks every 2nd step, 2 outer levels in all", _FAST),
        Shot("Every 2nd step, 1 outer level in all", _FAST, {_REUSE: {"outer_levels": 1}}),
        Shot("Every 5th step, 1 outer level in all", _FAST, {_REUSE: {"every": 5, "outer_levels": 1}}),
    ),
)
