"""How the dialects name weights, and back to published names.

A name has a prefix that says which model it is for, the layer, written with points or with underscores, and a leaf
such as ``.lora_down.weight``. Underscores are undone with the words that layer names of Stable Cascade are made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from ..names import FUSED, stage_of

# Leaf -> what it is. The first two styles are kohya's and PEFT's; then comes PEFT's name of DoRA's sizes, and LyCORIS.
LEAVES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_mid.weight": "mid",
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
# Before the rest of a name: what PEFT's own files put there.
_WRAPPER = "base_model.model."

# Longest first. `lora_prior_prior_` and `attn_to_out_proj` are OneTrainer's of February 2024.
_PREFIXES = {
    "lora_prior_prior_": "stage_c",
    "lora_prior_unet_": "stage_c",
    "lora_unet_": "stage_c",
    "lora_prior_te_": "text_encoder",
    "lora_te_": "text_encoder",
    "diffusion_model.": "stage_c",
    "prior.": "stage_c",
    "unet.": "stage_c",
    "text_encoder.": "text_encoder",
    "": "",
}

_WORDS = sorted(
    (
        "clip_txt_pooled_mapper", "clip_txt_mapper", "clip_img_mapper", "embedding", "down_blocks", "up_blocks",
        "down_downscalers", "up_upscalers", "down_repeat_mappers", "up_repeat_mappers", "clf", "blocks", "depthwise",
        "channelwise", "mapper_sca", "mapper_crp", "mapper", "kv_mapper", "attention", "attn", "in_proj", "out_proj",
        "to_out_proj", "to_out", "to_q", "to_k", "to_v", "text_model", "text_projection", "encoder", "layers",
        "self_attn", "q_proj", "k_proj", "v_proj", "mlp", "fc1", "fc2", "embeddings", "token_embedding",
        "position_embedding",
    ),
    key=len,
    reverse=True,
)  # fmt: skip
_WORD = re.compile(rf"(?:({'|'.join(_WORDS)})|(\d+))(?:_|$)")
_ATTENTION = re.compile(r"^(.*\.attention)\.(?:attn\.)?(.*)$")
_TAILS = {
    "to_q": "to_q.weight", "to_k": "to_k.weight", "to_v": "to_v.weight",
    "in_proj.0": "to_q.weight", "in_proj.1": "to_k.weight", "in_proj.2": "to_v.weight",
    "in_proj": FUSED, "in_proj_weight": FUSED,
    "out_proj": "out_proj.weight", "to_out.0": "out_proj.weight", "to_out_proj": "out_proj.weight",
}  # fmt: skip


class Piece(NamedTuple):
    """One tensor of a LoRA file: the published name of the weight, and which of `LEAVES` it is."""

    weight: str
    leaf: str


def read_name(key: str) -> Piece | None:
    """What a tensor name means in any dialect but the reference's; None where it means nothing here."""
    for leaf, kind in LEAVES.items():
        if key.endswith(leaf):
            weight = _published(key.removesuffix(leaf))
            return Piece(weight, kind) if weight else None
    return None


def _published(stem: str) -> str:
    stem = stem.removeprefix(_WRAPPER)
    prefix = next(prefix for prefix in _PREFIXES if stem.startswith(prefix))
    layer = stem[len(prefix) :]
    dotted = _dotted(layer) if "." not in layer else layer
    if not dotted:
        return ""
    weight = f"{dotted}.weight"
    if match := _ATTENTION.match(dotted):
        tail = _TAILS.get(match[2])
        if tail is None:
            return ""
        weight = f"{match[1]}.attn.{tail}"
    # A prefix of one model and a layer of the other: neither.
    return weight if _PREFIXES[prefix] in ("", stage_of(weight)) else ""


def _dotted(layer: str) -> str:
    """``down_blocks_0_2_attention`` as ``down_blocks.0.2.attention``; empty where a word is unknown."""
    words, place = [], 0
    while place < len(layer):
        match = _WORD.match(layer, place)
        if match is None:
            return ""
        words.append(match[1] or match[2])
        place = match.end()
    return ".".join(words)


def comfyui_name(weight: str) -> str:
    """What ComfyUI's key maps call a weight: ``lora_unet_down_blocks_0_2_attention_attn_to_q``."""
    layer = weight.removesuffix(".weight")
    if layer == "text_projection":
        return "lora_prior_te_text_projection"  # the only name that ComfyUI has for it
    prefix = "lora_te_" if stage_of(weight) == "text_encoder" else "lora_unet_"
    return prefix + layer.replace(".", "_")


def onetrainer_name(weight: str) -> str:
    """OneTrainer's own names until 2025: ``lora_prior_unet_down_blocks_0_2_attention_attn_to_q``."""
    prefix = "lora_prior_te_" if stage_of(weight) == "text_encoder" else "lora_prior_unet_"
    return prefix + weight.removesuffix(".weight").replace(".", "_")


def diffusers_name(weight: str) -> str:
    """The layer as diffusers has it, with PEFT's prefixes: ``prior.down_blocks.0.2.attention.to_q``."""
    layer = weight.removesuffix(".weight")
    if stage_of(weight) == "text_encoder":
        return f"text_encoder.{layer}"
    if match := _ATTENTION.match(layer):
        layer = f"{match[1]}.{'to_out.0' if match[2] == 'out_proj' else match[2]}"
    return f"prior.{layer}"


NAMING: dict[str, Callable[[str], str]] = {
    "comfyui": comfyui_name,
    "onetrainer": onetrainer_name,
    "diffusers": diffusers_name,
}
