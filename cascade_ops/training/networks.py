"""Networks to train from scratch: the published sizes by name, and what each kind of network can be told."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .. import models
from ..models.effnet import DEPTHS, WIDTHS

# Constructor arguments that tell the sizes apart; the rest are the class's defaults. Source: the configurations of
# Stability-AI/StableCascade (``configs/training``), checked against the published parameter counts.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "stage_c": {
        "3.6B": {"c_cond": 2048, "c_hidden": [2048, 2048], "nhead": [32, 32], "blocks": [[8, 24], [24, 8]]},
        "1B lite": {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]},
    },
    "stage_b": {
        "1.5B": {
            "c_hidden": [320, 640, 1280, 1280],
            "nhead": [-1, -1, 20, 20],
            "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]],
            "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
        },
        "700M lite": {
            "c_hidden": [320, 576, 1152, 1152],
            "nhead": [-1, 9, 18, 18],
            "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
            "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
        },
    },
    "stage_a": {"18M": {"levels": 2, "bottleneck_blocks": 12, "c_hidden": 384, "codebook_size": 8192}},
    "latent_encoder": {"20M": {"widths": list(WIDTHS), "depths": list(DEPTHS)}},
}

_CLASSES = {
    "stage_c": models.StageC,
    "stage_b": models.StageB,
    "stage_a": models.StageA,
    "latent_encoder": models.LatentEncoder,
    "previewer": models.Previewer,
    "controlnet": models.ControlNet,
}

# Of transformers' CLIPTextConfig and CLIPVisionConfig, which take any name and leave unknown ones without effect.
_CLIP = (
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor",
)  # fmt: skip
_CLIP_ARGUMENTS = {
    "text_encoder": [*_CLIP, "vocab_size", "max_position_embeddings"],
    "image_encoder": [*_CLIP, "image_size", "patch_size", "num_channels"],
}


def sized_network(target: str, network: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments: those of the published ``size`` if it is given, changed by everything else in `network`.

    Raises:
        ValueError: no such size.
    """
    arguments = dict(network)
    size = arguments.pop("size", None)
    if size is None:
        return arguments
    sizes = SIZES.get(target, {})
    if size not in sizes:
        known = ", ".join(f'"{name}"' for name in sizes)
        raise ValueError(
            f"`network.size` is {size!r}, expected one of the published sizes of {target}: {known}."
            if sizes
            else f"`network.size` is {size!r}, and {target} has no published sizes: give the constructor's arguments."
        )
    return {**sizes[size], **arguments}


def network_arguments(target: str) -> list[str] | None:
    """Names of the constructor's arguments; None where this module does not know them."""
    if target in _CLIP_ARGUMENTS:
        return _CLIP_ARGUMENTS[target]
    known = _CLASSES.get(target)
    return list(inspect.signature(known).parameters) if known else None


def empty_network(stage: str, config: dict[str, Any]) -> nn.Module:
    """The network of a stage on the meta device: shapes without memory."""
    with torch.device("meta"):
        if stage == "text_encoder":
            from transformers import CLIPTextConfig, CLIPTextModelWithProjection

            return CLIPTextModelWithProjection(CLIPTextConfig(**config))
        if stage == "image_encoder":
            from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

            return CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        return _CLASSES[stage](**config)
