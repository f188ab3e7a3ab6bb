"""Stable Cascade as ComfyUI nodes."""

from .nodes import bridge, runtime
from .nodes.latents import CascadeDecodeStageA, CascadeEmptyLatent, CascadePreviewLatent
from .nodes.loaders import (
    CascadeLoadCheckpoint,
    CascadeLoadPreviewer,
    CascadeLoadStageA,
    CascadeLoadStageB,
    CascadeLoadStageC,
    CascadeLoadTextEncoder,
)
from .nodes.sampling import CascadeSampleStageB, CascadeSampleStageC
from .nodes.text import CascadeEncodeText

# Ids are frozen: workflows and API prompts name them.
NODE_CLASS_MAPPINGS: dict[str, type] = {
    "CascadeLoadStageC": CascadeLoadStageC,
    "CascadeLoadStageB": CascadeLoadStageB,
    "CascadeLoadStageA": CascadeLoadStageA,
    "CascadeLoadTextEncoder": CascadeLoadTextEncoder,
    "CascadeLoadCheckpoint": CascadeLoadCheckpoint,
    "CascadeLoadPreviewer": CascadeLoadPreviewer,
    "CascadeEncodeText": CascadeEncodeText,
    "CascadeEmptyLatent": CascadeEmptyLatent,
    "CascadeSampleStageC": CascadeSampleStageC,
    "CascadeSampleStageB": CascadeSampleStageB,
    "CascadeDecodeStageA": CascadeDecodeStageA,
    "CascadePreviewLatent": CascadePreviewLatent,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "CascadeLoadStageC": "Cascade: load Stage C",
    "CascadeLoadStageB": "Cascade: load Stage B",
    "CascadeLoadStageA": "Cascade: load Stage A",
    "CascadeLoadTextEncoder": "Cascade: load text encoder",
    "CascadeLoadCheckpoint": "Cascade: load checkpoint",
    "CascadeLoadPreviewer": "Cascade: load previewer",
    "CascadeEncodeText": "Cascade: encode text",
    "CascadeEmptyLatent": "Cascade: empty latent",
    "CascadeSampleStageC": "Cascade: sample Stage C",
    "CascadeSampleStageB": "Cascade: sample Stage B",
    "CascadeDecodeStageA": "Cascade: decode Stage A",
    "CascadePreviewLatent": "Cascade: preview latent",
}
if runtime.in_comfyui():
    NODE_CLASS_MAPPINGS |= bridge.NODE_CLASS_MAPPINGS
    NODE_DISPLAY_NAME_MAPPINGS |= bridge.NODE_DISPLAY_NAME_MAPPINGS
WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
