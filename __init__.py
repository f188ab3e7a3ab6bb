"""Stable Cascade as ComfyUI nodes."""

from .nodes import bridge, runtime
from .nodes.accelerate import CascadeAccelerateStageA, CascadeAccelerateStageB, CascadeAccelerateStageC
from .nodes.approximate import CascadeReuseInnerBlocks
from .nodes.control import (
    CascadeApplyControlNet,
    CascadeCannyControl,
    CascadeInpaintControl,
    CascadeLoadControlNet,
    CascadeSuperResolutionControl,
)
from .nodes.encoding import CascadeEncodeStageA, CascadeEncodeStageC
from .nodes.examples import CascadeExampleImage
from .nodes.explore import CascadeSelectLatents
from .nodes.faces import CascadeDetectFaces, CascadeFaceIdentityControl, CascadeLoadFaces
from .nodes.image_prompt import CascadeImagePrompt
from .nodes.ip_adapter import CascadeApplyIPAdapter, CascadeLoadIPAdapter
from .nodes.latents import CascadeDecodeStageA, CascadeEmptyLatent, CascadePreviewLatent
from .nodes.loaders import (
    CascadeLoadCheckpoint,
    CascadeLoadImageEncoder,
    CascadeLoadLatentEncoder,
    CascadeLoadPreviewer,
    CascadeLoadStageA,
    CascadeLoadStageB,
    CascadeLoadStageC,
    CascadeLoadTextEncoder,
)
from .nodes.lora import CascadeLoadLoRA
from .nodes.masks import CascadeFeatherMask, CascadePadForOutpainting
from .nodes.sampling import CascadeSampleStageB, CascadeSampleStageC
from .nodes.sizes import CascadeProposeSize
from .nodes.text import CascadeEncodeText
from .nodes.training import CascadeTrainControlNet, CascadeTrainIPAdapter, CascadeTrainLoRA

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
    "CascadeLoadLatentEncoder": CascadeLoadLatentEncoder,
    "CascadeLoadImageEncoder": CascadeLoadImageEncoder,
    "CascadeLoadControlNet": CascadeLoadControlNet,
    "CascadeLoadIPAdapter": CascadeLoadIPAdapter,
    "CascadeLoadLoRA": CascadeLoadLoRA,
    "CascadeCannyControl": CascadeCannyControl,
    "CascadeInpaintControl": CascadeInpaintControl,
    "CascadeSuperResolutionControl": CascadeSuperResolutionControl,
    "CascadeApplyControlNet": CascadeApplyControlNet,
    "CascadeApplyIPAdapter": CascadeApplyIPAdapter,
    "CascadeTrainLoRA": CascadeTrainLoRA,
    "CascadeTrainControlNet": CascadeTrainControlNet,
    "CascadeTrainIPAdapter": CascadeTrainIPAdapter,
    "CascadeExampleImage": CascadeExampleImage,
    "CascadeSelectLatents": CascadeSelectLatents,
    "CascadeEncodeStageC": CascadeEncodeStageC,
    "CascadeEncodeStageA": CascadeEncodeStageA,
    "CascadeFeatherMask": CascadeFeatherMask,
    "CascadePadForOutpainting": CascadePadForOutpainting,
    "CascadeImagePrompt": CascadeImagePrompt,
    "CascadeProposeSize": CascadeProposeSize,
    "CascadeLoadFaces": CascadeLoadFaces,
    "CascadeDetectFaces": CascadeDetectFaces,
    "CascadeFaceIdentityControl": CascadeFaceIdentityControl,
    "CascadeReuseInnerBlocks": CascadeReuseInnerBlocks,
    "CascadeAccelerateStageC": CascadeAccelerateStageC,
    "CascadeAccelerateStageB": CascadeAccelerateStageB,
    "CascadeAccelerateStageA": CascadeAccelerateStageA,
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
    "CascadeLoadLatentEncoder": "Cascade: load latent encoder",
    "CascadeLoadImageEncoder": "Cascade: load image encoder",
    "CascadeLoadControlNet": "Cascade: load ControlNet",
    "CascadeLoadIPAdapter": "Cascade: load IP-Adapter",
    "CascadeLoadLoRA": "Cascade: load LoRA",
    "CascadeCannyControl": "Cascade: canny control",
    "CascadeInpaintControl": "Cascade: inpaint control",
    "CascadeSuperResolutionControl": "Cascade: super-resolution control",
    "CascadeApplyControlNet": "Cascade: apply ControlNet",
    "CascadeApplyIPAdapter": "Cascade: apply IP-Adapter",
    "CascadeTrainLoRA": "Cascade: train LoRA",
    "CascadeTrainControlNet": "Cascade: train ControlNet",
    "CascadeTrainIPAdapter": "Cascade: train IP-Adapter",
    "CascadeExampleImage": "Cascade: example image",
    "CascadeSelectLatents": "Cascade: select latents",
    "CascadeEncodeStageC": "Cascade: encode Stage C",
    "CascadeEncodeStageA": "Cascade: encode Stage A",
    "CascadeFeatherMask": "Cascade: feather mask",
    "CascadePadForOutpainting": "Cascade: pad for outpainting",
    "CascadeImagePrompt": "Cascade: image prompt",
    "CascadeProposeSize": "Cascade: propose size",
    "CascadeLoadFaces": "Cascade: load faces",
    "CascadeDetectFaces": "Cascade: detect faces",
    "CascadeFaceIdentityControl": "Cascade: face identity control",
    "CascadeReuseInnerBlocks": "Cascade: reuse inner blocks (approximation)",
    "CascadeAccelerateStageC": "Cascade: accelerate Stage C",
    "CascadeAccelerateStageB": "Cascade: accelerate Stage B",
    "CascadeAccelerateStageA": "Cascade: accelerate Stage A",
}
if runtime.in_comfyui():
    NODE_CLASS_MAPPINGS |= bridge.NODE_CLASS_MAPPINGS
    NODE_DISPLAY_NAME_MAPPINGS |= bridge.NODE_DISPLAY_NAME_MAPPINGS
WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
