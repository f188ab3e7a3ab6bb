"""Nodes between ComfyUI's own models and these; there only inside ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle

CATEGORY = "cascade/bridge"

_MODEL = (
    "MODEL",
    {
        "tooltip": "A Stable Cascade model from ComfyUI's own loaders, with LoRAs or without. What changes more than "
        "weights (samplers, attention) is refused."
    },
)


class _FromModel:
    """A handle of ComfyUI's model; subclasses say which stage."""

    STAGE = ""
    CATEGORY = CATEGORY
    FUNCTION = "convert"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": _MODEL}}

    def convert(self, model: Any) -> dict[str, Any]:
        from .comfyui_bridge import from_model

        handle = from_model(model, self.STAGE)
        return {"ui": {"text": [handle.title]}, "result": (handle,)}


class CascadeStageCFromModel(_FromModel):
    STAGE = "stage_c"
    DESCRIPTION = (
        "Takes a Stage C that ComfyUI's own loader loaded, LoRAs included, for the Cascade sampling nodes. The weights "
        "are shared, not copied."
    )
    RETURN_TYPES = ("CASCADE_STAGE_C",)
    RETURN_NAMES = ("stage_c",)
    OUTPUT_TOOLTIPS = ("Stage C, for 'Cascade: empty latent' and 'Cascade: sample Stage C'.",)


class CascadeStageBFromModel(_FromModel):
    STAGE = "stage_b"
    DESCRIPTION = (
        "Takes a Stage B that ComfyUI's own loader loaded, LoRAs included, for the Cascade sampling nodes. The weights "
        "are shared, not copied."
    )
    RETURN_TYPES = ("CASCADE_STAGE_B",)
    RETURN_NAMES = ("stage_b",)
    OUTPUT_TOOLTIPS = ("Stage B, for 'Cascade: sample Stage B'.",)


class CascadeToModel:
    DESCRIPTION = (
        "Gives a Stage C or Stage B to ComfyUI's own nodes: KSampler, LoRA loaders, model patches. The weights are "
        "shared, not copied."
    )
    CATEGORY = CATEGORY
    FUNCTION = "convert"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The same model for ComfyUI's own nodes, such as KSampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage": (
                    "CASCADE_STAGE_C,CASCADE_STAGE_B",
                    {"tooltip": "The model, from 'Cascade: load Stage C' or 'Cascade: load Stage B'."},
                )
            }
        }

    def convert(self, stage: StageHandle) -> tuple[Any]:
        from .comfyui_bridge import to_model

        return (to_model(stage),)


# Ids are frozen: workflows and API prompts name them.
NODE_CLASS_MAPPINGS: dict[str, type] = {
    "CascadeStageCFromModel": CascadeStageCFromModel,
    "CascadeStageBFromModel": CascadeStageBFromModel,
    "CascadeToModel": CascadeToModel,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "CascadeStageCFromModel": "Cascade: Stage C from MODEL",
    "CascadeStageBFromModel": "Cascade: Stage B from MODEL",
    "CascadeToModel": "Cascade: stage to MODEL",
}
