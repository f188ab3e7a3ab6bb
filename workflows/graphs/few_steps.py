"""Stage C in a few steps."""

from __future__ import annotations

from ..layout import Column, Shot, Workflow
from .parts import FILES, MODELS, decode, prompt, sample_b, sample_c, save, size

_NOTE = f"""\
# Few steps

Stage C makes a picture in four steps of the sampler `lcm`, which names the clean picture in each step and noises it
anew for the next; that is enough where a prompt says all, and where it leaves much open the shapes blur. **Change
first:** the prompt; then `steps` (8 is the safer choice), and if you have a LoRA that was distilled for few steps, put
*load LoRA* behind *load Stage C*, connect it to both its places and set `guidance` to 1.

{FILES}"""
_SAMPLE, _PICTURE = 9, 12
# Where a prompt leaves something open, few steps make a difference.
_OPEN = {"text": "a blue cross on a yellow background"}

LCM = Workflow(
    "lcm",
    _NOTE,
    (
        MODELS,
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a large red circle on the left on a yellow background"),
                prompt(7, "Negative prompt", ""),
                size(8),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(_SAMPLE, 6, 7, 8, sampler="lcm", steps=4),), "stage_c"),
        Column("Stage B: detail", (sample_b(10, _SAMPLE, 6, 7),), "stage_b"),
        Column("Stage A: the picture", (decode(11, 10), save(_PICTURE, 11)), "stage_a", width=300),
    ),
    shots=(
        Shot("ddpm, 20 steps", _PICTURE, {6: _OPEN, _SAMPLE: {"sampler": "ddpm", "steps": 20, "seed": 8}}),
        *(
            Shot(f"lcm, {steps} steps", _PICTURE, {6: _OPEN, _SAMPLE: {"steps": steps, "seed": 8}})
            for steps in (8, 4, 2)
        ),
    ),
)
