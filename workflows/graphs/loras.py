"""LoRAs: a look or a subject on Stage C, and the new words that come with one."""

from __future__ import annotations

from ..layout import Column, Node, Shot, Workflow
from .parts import FILES, MODELS, decode, prompt, sample_b, sample_c, save, size

_ROW = "| your LoRA, of any trainer | loras |\n"


def _lora(id: int, **inputs: object) -> Node:
    return Node(id, "CascadeLoadLoRA", {"stage_c": (2, 0), **inputs}, said=True)


LORA = Workflow(
    "lora",
    f"# LoRA\n{FILES}",
    (
        MODELS,
        Column("LoRA", (_lora(13),), "stage_c"),
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a large red circle on the left on a striped background"),
                prompt(7, "Negative prompt", ""),
                size(8, stage_c=(13, 0)),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(9, 6, 7, 8, stage_c=(13, 0)),), "stage_c"),
        Column("Stage B: detail", (sample_b(10, 9, 6, 7),), "stage_b"),
        Column("Stage A: the picture", (decode(11, 10), save(12, 11)), "stage_a", width=300),
    ),
)
