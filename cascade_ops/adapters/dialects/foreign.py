"""What a file is that is no LoRA for this model, so that a message can say it by name."""

from __future__ import annotations

import re
from collections.abc import Collection

from ...checkpoints import inspect_file
from ...checkpoints.info import MODELS
from ...checkpoints.source import Source

# The words are those of the trainers: kohya's with underscores, diffusers' and ComfyUI's with points.
_LORAS = (
    ("Stable Diffusion XL", r"lora_te[12]_|text_encoder_2\.|(?:input|output)_blocks[_.]\d+[_.]1[_.]|add_embedding"),
    ("Stable Diffusion XL", r"attentions[_.]\d+[_.]transformer_blocks[_.][1-9]"),
    ("Stable Diffusion 1 or 2", r"(?:down|up)_blocks[_.]\d[_.]attentions[_.]|mid_block[_.]attentions"),
    ("Stable Diffusion 3", r"joint_blocks|lora_te3_"),
    ("Flux", r"double_blocks|single_blocks|single_transformer_blocks"),
    ("Stable Diffusion 3 or Flux", r"transformer[_.]transformer_blocks"),
    ("Würstchen 2", r"prior_(?:unet_)?blocks_\d+_attention|^prior\.blocks\."),
)
_STAGE_B = r"effnet_mapper|pixels_mapper|(?:^|[._])clip_mapper|(?:down|up)_blocks[._][23][._]\d+[._]attention"
_LEVELS_OF_C = r"(?:down|up)_blocks[._][01][._]\d+[._]attention"
_TURNING = re.compile(r"\.b?oft_|\.oft_diag|\.vera_|\.lora_embedding_")


def other_lora(keys: Collection[str]) -> str:
    """Which model a LoRA is for, where its tensor names say that it is not Stage C; empty otherwise."""
    for title, pattern in _LORAS:
        if _any(pattern, keys):
            return title
    if _any(_STAGE_B, keys) and not _any(_LEVELS_OF_C, keys):
        return "Stage B of Stable Cascade"
    return ""


def described(source: Source) -> str:
    """What a file without a readable LoRA is, and what to do instead: the end of a message."""
    keys = list(source.tensors)
    if turning := next((key for key in keys if _TURNING.search(key)), ""):
        return (
            f"holds OFT or another kind of adapter that cannot be read ('{turning}'), because it turns or multiplies "
            "weights where a LoRA adds to them and trainers disagree about how, expected LoRA, LoHa, LoKr or DoRA: "
            "train one of those, or let the trainer merge it into a model and load that"
        )
    info = inspect_file(source.path)
    if info.stage in (*MODELS, "combined", "embedding"):
        return (
            f"is {'a' if info.stage not in MODELS else 'the model'} {info.title}, expected a LoRA of Stable Cascade: "
            "choose a LoRA here, and load this file where it belongs"
        )
    return (
        f"holds no LoRA of Stable Cascade in a known dialect (its first tensor: '{next(iter(keys), 'none')}'), "
        "expected names such as 'lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight': choose another file"
    )


def _any(pattern: str, keys: Collection[str]) -> bool:
    expression = re.compile(pattern)
    return any(expression.search(key) for key in keys)
