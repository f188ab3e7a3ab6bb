"""Between ComfyUI's own Stable Cascade models and the handles of these nodes, in both directions and without copies.

From ComfyUI: its network lends its layers to ours, and its patcher, with the LoRAs on it, goes on managing the weights.
To ComfyUI: its network is built around the handle's weights, and its patcher takes over from the handle's own, so that
both sides move the same weights with one book-keeping.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..cascade_ops.checkpoints import FileInfo
from ..cascade_ops.checkpoints.errors import STAGE_TITLES
from ..cascade_ops.checkpoints.loading import ParametersWithoutMemory
from ..cascade_ops.checkpoints.releases import RELEASES, SAMPLING_DEFAULTS
from ..cascade_ops.float16 import refuse_rescaled
from ..cascade_ops.handles import StageHandle
from ..cascade_ops.models import StageB, StageC
from .comfyui_layers import lent_by, rebuilt
from .comfyui_models import manage, managed, new_patcher

_NETWORKS = {"stage_c": StageC, "stage_b": StageB}
# ComfyUI's classes: the model, and what describes it.
_MODELS = {"stage_c": "StableCascade_C", "stage_b": "StableCascade_B"}
_CONFIGS = {"stage_c": "Stable_Cascade_C", "stage_b": "Stable_Cascade_B"}
# In ComfyUI's description, but no argument of the network.
_NOT_OURS = ("stable_cascade_stage", "dtype")
# The width of image embeddings that ComfyUI assumes where no picture is given.
_CORE_IMAGE_WIDTH = 768

# What a file said that a network cannot, by the ComfyUI model that was made of its handle.
_origins: WeakKeyDictionary[nn.Module, tuple[FileInfo, str]] = WeakKeyDictionary()


def from_model(patcher: Any, stage: str) -> StageHandle:
    """The handle of a ComfyUI `MODEL`, patches on its weights included.

    The weights stay ComfyUI's: loading the handle loads the model. Raises ValueError for another model, and for what it
    carries beside such patches.
    """
    model = patcher.model
    base = importlib.import_module("comfy.model_base")
    if not isinstance(model, getattr(base, _MODELS[stage])):
        found = next((title for name, title in _known(base).items() if isinstance(model, getattr(base, name))), None)
        raise ValueError(
            f"The model is {found or 'a ' + type(model).__name__}, expected {STAGE_TITLES[stage]} of Stable Cascade: "
            f"load a file of that stage, such as stable_cascade_{stage}.safetensors."
        )
    if others := _beside_weights(patcher):
        raise ValueError(
            f"The model carries {', '.join(others)}, which the samplers of these nodes cannot follow, expected nothing "
            "but patches on weights such as LoRAs: connect it from before the nodes that add the rest (guidance "
            "rescale and shift are inputs of the Cascade samplers)."
        )
    core = model.diffusion_model
    info, name = _origins.get(model) or _described(model, stage)
    with ParametersWithoutMemory():
        skeleton = _NETWORKS[stage](**info.config)
    network = rebuilt(skeleton.eval().requires_grad_(False), lent_by(core))
    network.compute_dtype = model.manual_cast_dtype or model.get_dtype()
    handle = StageHandle(stage, network, info, name)
    manage(handle, patcher, None)
    return handle


def to_model(handle: StageHandle) -> Any:
    """The handle as a ComfyUI `MODEL`, for its samplers, LoRA loaders and model patches."""
    if handle.stage not in _NETWORKS:
        raise ValueError(f"{handle.title} was given, expected Stage C or Stage B: only these are models to ComfyUI.")
    if handle.weights:
        raise ValueError(
            f"{handle.title} was given, expected float weights, the only ones that ComfyUI's own Stable Cascade takes "
            "from here: load it as auto, or sample it with the Cascade nodes."
        )
    if handle.attached:
        raise ValueError(
            f"{handle.title} carries {' and '.join(each.title for each in handle.attached)}, which ComfyUI's own nodes "
            "cannot follow, expected Stage C alone: connect it from before the nodes that apply them, or sample it "
            "with 'Cascade: sample Stage C'."
        )
    if handle.reuse is not None:
        raise ValueError(
            f"{handle.title} reuses its inner blocks, which ComfyUI's own nodes cannot follow, expected Stage B alone: "
            "connect it from before 'Cascade: reuse inner blocks (approximation)'."
        )
    refuse_rescaled(handle.module, handle.title, "ComfyUI's own network")
    patcher = managed(handle).patcher
    if not hasattr(patcher.model, "diffusion_model"):
        patcher.detach()  # all weights back where they wait, before another patcher moves them
        patcher = _core_patcher(handle)
        network = from_model(patcher, handle.stage).network
        manage(handle, patcher, network)
    return patcher.clone()


def _core_patcher(handle: StageHandle) -> Any:
    """ComfyUI's own model around the handle's weights, in a patcher."""
    supported = importlib.import_module("comfy.supported_models")
    description = {"stable_cascade_stage": handle.stage[-1], **handle.info.config}
    config = getattr(supported, _CONFIGS[handle.stage])(description)
    config.set_inference_dtype(handle.dtype, None)
    config.sampling_settings["shift"] = handle.info.defaults["shift"]
    model = config.get_model({}, "", device="meta")
    if handle.stage == "stage_c" and handle.info.config["c_clip_img"] != _CORE_IMAGE_WIDTH:
        model.__class__ = _with_image_width(type(model), handle.info.config["c_clip_img"])
    _share_weights(model.diffusion_model, dict(handle.network.named_parameters()))
    _origins[model] = handle.info, handle.name
    return new_patcher(model, handle.stage)


def _share_weights(core: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Put the handle's weights into ComfyUI's network, whose query, key and value are the thirds of the packed ones."""
    for name, _ in list(core.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        block, _, layer = owner.rpartition(".")
        if layer in ("to_q", "to_k", "to_v"):
            third = ("to_q", "to_k", "to_v").index(layer)
            part = weights[f"{block}.in_proj_{leaf}"].detach().chunk(3)[third]
            parameter = nn.Parameter(part, requires_grad=False)
        else:
            parameter = weights[name]
        setattr(core.get_submodule(owner), leaf, parameter)


def _with_image_width(kind: type, width: int) -> type:
    """ComfyUI's Stage C for image embeddings of another width: it fills in 768 zeros where no picture is given."""

    class StableCascadeC(kind):  # type: ignore[misc, valid-type]
        def extra_conds(self, **given: Any) -> dict[str, Any]:
            conditions = super().extra_conds(**given)
            if "unclip_conditioning" not in given:
                regular = importlib.import_module("comfy.conds").CONDRegular
                conditions["clip_img"] = regular(torch.zeros(1, 1, width))
            return conditions

    return StableCascadeC


def _described(model: nn.Module, stage: str) -> tuple[FileInfo, str]:
    """What is known of a model that ComfyUI loaded: its sizes, and which release has so many weights."""
    core = model.diffusion_model
    weights = list(core.parameters())
    count = sum(weight.numel() for weight in weights)
    release = RELEASES.get((stage, count))
    config = {key: value for key, value in model.model_config.unet_config.items() if key not in _NOT_OURS}
    info = FileInfo(
        path=Path("MODEL"),
        stage=stage,
        size=release.size if release else "custom",
        rank=release.rank if release else 2,
        layout="comfyui split q/k/v",
        prefix="",
        dtypes=(),
        parameters=count,
        tensors=len(weights),
        weight_bytes=sum(_bytes(weight) for weight in weights),
        config=config,
        unknown=(),
        defaults=dict(SAMPLING_DEFAULTS[stage]),
    )
    return info, "from ComfyUI"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _known(base: Any) -> dict[str, str]:
    return {_MODELS[stage]: STAGE_TITLES[stage] for stage in _MODELS}


def _beside_weights(patcher: Any) -> list[str]:
    """Names of what a patcher carries beside patches on weights."""
    found = []
    for key, value in patcher.model_options.items():
        if key == "transformer_options":
            found += [f"'{inner}'" for inner, given in value.items() if given]
        elif value:
            found.append(f"'{key}'")
    found += [f"'{path}'" for path in patcher.object_patches]
    for attribute in ("additional_models", "injections", "hook_patches", "wrappers"):
        if _filled(getattr(patcher, attribute, None)):
            found.append(f"'{attribute}'")
    return sorted(set(found))


def _filled(value: Any) -> bool:
    """Whether anything is in a mapping, at any depth."""
    if isinstance(value, Mapping):
        return any(_filled(inner) for inner in value.values())
    return bool(value)
