"""Nodes that let Stage C read pictures through an IP-Adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import runtime
from .control import strength, times
from .loaders import CATEGORY as LOADERS
from .loaders import _file_input, _LoadStage

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_ops.handles import StageHandle

CATEGORY = "cascade/adapters"


class CascadeLoadIPAdapter(_LoadStage):
    STAGE = "ip_adapter"
    CATEGORY = LOADERS
    DESCRIPTION = (
        "Loads an IP-Adapter, which lets Stage C read a picture beside the prompt: what is in it and its look."
    )
    RETURN_TYPES = ("CASCADE_IP_ADAPTER",)
    RETURN_NAMES = ("ip_adapter",)
    OUTPUT_TOOLTIPS = ("The IP-Adapter, for 'Cascade: apply IP-Adapter'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": _file_input("ip_adapter", "IP-Adapter")}}


class CascadeApplyIPAdapter:
    DESCRIPTION = (
        "Lets Stage C read a picture through an IP-Adapter, beside the prompt. The Stage C that comes out shares the "
        "weights of the one that went in, which stays as it was; several can be applied one after another."
    )
    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("CASCADE_STAGE_C",)
    RETURN_NAMES = ("stage_c",)
    OUTPUT_TOOLTIPS = ("Stage C that reads the picture, for 'Cascade: sample Stage C'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_c": ("CASCADE_STAGE_C", {"tooltip": "The model, from 'Cascade: load Stage C'."}),
                "ip_adapter": ("CASCADE_IP_ADAPTER", {"tooltip": "The adapter, from 'Cascade: load IP-Adapter'."}),
                "image_encoder": (
                    "CASCADE_IMAGE_ENCODER",
                    {"tooltip": "Turns the picture into what the adapter reads, from 'Cascade: load image encoder'."},
                ),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "The picture to read; of a wide or tall one, the square in the middle. Several in a "
                        "batch are read together for every picture that is made."
                    },
                ),
                "weight": strength("How much of the picture is taken over. 1 is what the adapter learned, 0 is off."),
                **times("The picture is"),
            }
        }

    def apply(
        self,
        stage_c: StageHandle,
        ip_adapter: StageHandle,
        image_encoder: StageHandle,
        image: Tensor,
        weight: float,
        start: float,
        end: float,
    ) -> dict[str, Any]:
        from ..cascade_ops.attachments import apply_ip_adapter, check_ip_adapter
        from ..cascade_ops.control_inputs import as_channels_first
        from ..cascade_ops.vision import encode_pictures

        check_ip_adapter(stage_c, ip_adapter)
        pictures = as_channels_first(image)
        runtime.check_interrupted()
        (image_encoder,) = runtime.placed([image_encoder])
        embeddings = encode_pictures(image_encoder, pictures).cpu()
        together = embeddings.reshape(1, -1, embeddings.shape[-1])
        applied = apply_ip_adapter(stage_c, ip_adapter, together, weight, start, end)
        said = applied.ip_adapters[-1].describe()
        return {
            "ui": {"text": [f"{said}, {len(pictures)} pictures" if len(pictures) > 1 else said]},
            "result": (applied,),
        }
