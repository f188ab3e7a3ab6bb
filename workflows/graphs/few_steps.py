"""Four steps instead of twenty: a LoRA and the sampler that it was distilled for."""

from __future__ import annotations

from ..layout import Column, Node, Shot, Workflow
from .parts import FILES, MODELS, decode, prompt, sample_b, sample_c, save, size

_ROW = "| a LoRA for few steps of your Stage C | loras |\n"
_NOTE = """\
# Few steps

A LoRA that was distilled from the model lets Stage C make a picture in four steps of the sampler `lcm`, and without
guidance, so that each step runs the model once instead of twice. **Change first:** the prompt and the seed; then
`steps` (2 to 8), and set `strength` of the LoRA to 0 to see what it does.

"""
_LORA, _SAMPLE, _PICTURE = 13, 9, 12
# Where a prompt leaves something open, few steps make a difference.
_OPEN = {"text": "a green star on a blue background"}
_OFF, _USUAL = {"strength": 0.0}, {"sampler": "ddpm", "steps": 20, "guidance": 0.0}

LCM = Workflow(
    "lcm",
    _NOTE + FILES.replace("| `stage_b", _ROW + "| `stage_b", 1),
    (
        MODELS,
        Column(
            "LoRA",
            (Node(_LORA, "CascadeLoadLoRA", {"stage_c": (2, 0), "file": "tiny few steps (bundled)"}, said=True),),
            "stage_c",
        ),
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a large red circle on the left on a yellow background"),
                prompt(7, "Negative prompt", ""),
                size(8, stage_c=(_LORA, 0)),
            ),
            "text",
        ),
        Column(
            "Stage C: what is seen",
            (sample_c(_SAMPLE, 6, 7, 8, stage_c=(_LORA, 0), sampler="lcm", steps=4, guidance=1.0),),
            "stage_c",
        ),
        Column("Stage B: detail", (sample_b(10, _SAMPLE, 6, 7),), "stage_b"),
        Column("Stage A: the picture", (decode(11, 10), save(_PICTURE, 11)), "stage_a", width=300),
    ),
    shots=(
        Shot("20 steps of ddpm with guidance", _PICTURE, {6: _OPEN, _LORA: _OFF, _SAMPLE: _USUAL}),
        Shot("4 steps of lcm without the LoRA", _PICTURE, {6: _OPEN, _LORA: _OFF}),
        Shot("4 steps of lcm with it", _PICTURE, {6: _OPEN}),
    ),
)
