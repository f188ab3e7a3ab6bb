"""Stage C, Stage B and Stage A as models of diffusers, over the same weights.

diffusers keeps the published names but for: queries, keys and values apart instead of packed (rows of one tensor here,
so views of it), ``clip_mapper`` of Stage B, and Stage A's codebook. It writes 0 heads where the release writes -1.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cascade_ops.models import StageA, StageB, StageC

if TYPE_CHECKING:
    from diffusers import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

_BLOCKS = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}
_RENAMED = (
    (".attention.attn.out_proj.", ".attention.to_out.0."),
    ("vquantizer.codebook.", "vquantizer.embedding."),
)
_PACKED = ".attention.attn.in_proj_"


def diffusers_weights(stage: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under diffusers' names; no tensor is copied."""
    result = {}
    for name, tensor in weights.items():
        if _PACKED in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace(_PACKED, f".attention.to_{letter}.")] = part
            continue
        for old, new in _RENAMED:
            name = name.replace(old, new)
        if stage == "stage_b" and name.startswith("clip_mapper."):
            name = name.replace("clip_mapper.", "clip_txt_pooled_mapper.")
        result[name] = tensor
    return result


def diffusers_config(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' constructor arguments for ours; ValueError for what diffusers does not have."""
    if stage == "stage_a":
        given = _all_arguments(StageA, config)
        names = {
            "levels": "levels",
            "bottleneck_blocks": "bottleneck_blocks",
            "c_hidden": "embed_dim",
            "c_latent": "latent_channels",
            "codebook_size": "num_vq_embeddings",
            "scale_factor": "scale_factor",
        }
        return {theirs: given[ours] for ours, theirs in names.items()}
    given = _all_arguments(StageB if stage == "stage_b" else StageC, config)
    letters = sorted(set("".join(given["level_config"])) - set(_BLOCKS))
    if letters:
        raise ValueError(f"The model has blocks {letters}, diffusers has only {sorted(_BLOCKS)}: compare another one.")
    levels = len(given["c_hidden"])
    repeat = given["block_repeat"] or [[1] * levels] * 2
    arguments = {
        "in_channels": given["c_in"],
        "out_channels": given["c_out"],
        "timestep_ratio_embedding_dim": given["c_r"],
        "patch_size": given["patch_size"],
        "conditioning_dim": given["c_cond"],
        "block_out_channels": list(given["c_hidden"]),
        "num_attention_heads": [max(0, heads) for heads in given["nhead"]],
        "down_num_layers_per_block": list(given["blocks"][0]),
        "up_num_layers_per_block": list(given["blocks"][1]),
        "down_blocks_repeat_mappers": list(repeat[0]),
        "up_blocks_repeat_mappers": list(repeat[1]),
        "block_types_per_layer": [[_BLOCKS[letter] for letter in level] for level in given["level_config"]],
        "clip_seq": given["c_clip_seq"],
        "kernel_size": given["kernel_size"],
        "dropout": 0.0,
        "self_attn": given["self_attn"],
        "timestep_conditioning_type": list(given["t_conds"]),
    }
    if stage == "stage_b":
        beyond = {
            "clip_text_pooled_in_channels": given["c_clip"],
            "effnet_in_channels": given["c_effnet"],
            "pixel_mapper_in_channels": given["c_pixels"],
        }
    else:
        beyond = {
            "clip_text_in_channels": given["c_clip_text"],
            "clip_text_pooled_in_channels": given["c_clip_text_pooled"],
            "clip_image_in_channels": given["c_clip_img"],
            "switch_level": list(given["switch_level"]),
        }
    return {**arguments, **beyond}


def diffusers_model(
    stage: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> StableCascadeUNet | PaellaVQModel:
    """diffusers' model over these weights of ours, which it shares; in evaluation mode and without gradients."""
    with torch.device("meta"):
        module: nn.Module = diffusers_class(stage)(**diffusers_config(stage, config))
    module.load_state_dict(diffusers_weights(stage, weights), assign=True)
    return module.eval().requires_grad_(False)


def diffusers_class(stage: str) -> type:
    """The class in diffusers for a stage."""
    if stage == "stage_a":
        from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

        return PaellaVQModel
    from diffusers import StableCascadeUNet

    return StableCascadeUNet


def _all_arguments(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(cls).bind(**config)
    bound.apply_defaults()
    return bound.arguments
