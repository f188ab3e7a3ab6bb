"""Pictures larger than the model's own."""

from __future__ import annotations

from dataclasses import replace

from ..layout import Column, Node, Shot, Workflow
from .parts import FILES, MODELS, decode, prompt, sample_b, sample_c, save, size

_NOTE = f"""\
# Large pictures

*Propose size* gives width, height and a compression with which Stage C still sees the whole picture as one, instead of
repeating its objects. Stage B then works in overlapping windows and Stage A in tiles, so that size costs time and not
memory.

**Change first:** `scale` and `aspect` in *propose size*. With the release set `window` in *sample Stage B* to 1024, or
to 0 if the picture fits into memory.

{FILES}"""

_LATENT = size(9)
_DECODE = decode(12, 11)

HIGH_RESOLUTION = Workflow(
    "high_resolution",
    _NOTE,
    (
        MODELS,
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a large red circle on the left on a blue background"),
                prompt(7, "Negative prompt", ""),
                Node(8, "CascadeProposeSize", {"stage_c": (2, 0), "aspect": "4:3", "scale": 2.0}, said=True),
                replace(
                    _LATENT,
                    inputs={**_LATENT.inputs, "width": (8, 0), "height": (8, 1), "compression": (8, 2)},
                ),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(10, 6, 7, 9),), "stage_c"),
        Column("Stage B: detail, in windows", (sample_b(11, 10, 6, 7, window=512),), "stage_b"),
        Column(
            "Stage A: the picture, in tiles",
            (replace(_DECODE, inputs={**_DECODE.inputs, "tile": 512}), save(13, 12)),
            "stage_a",
            width=300,
        ),
    ),
    shots=(
        Shot("Without compression: objects repeat", 13, {9: {"compression": 0.0}, 11: {"window": 0}}),
        Shot("With the proposed compression", 13, {11: {"window": 0}}),
        Shot("The same in windows and tiles", 13, {11: {"window": 256}, 12: {"tile": 128}}),
    ),
)
