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

GROUPS = {
    "down_outer": "the first of the four groups of attention blocks, which decides the background in the tiny model. "
    "0 leaves it to the prompt.",
    "down_inner": "the second group: with the third, the colour of the object in the tiny model. 0 leaves it to the "
    "prompt.",
    "up_inner": "the third group: with the second, the colour of the object in the tiny model. 0 leaves it to the "
    "prompt.",
    "up_outer": "the last group, which does little by itself in the tiny model. 0 leaves it to the prompt.",
}


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
        from ..cascade_ops.attachments import COMBINE

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
                        "tooltip": "The picture to read; of a wide or tall one, the square in the middle. Of several "
                        "in a batch, combine says what becomes of them."
                    },
                ),
                "weight": strength("How much of the picture is taken over. 1 is what the adapter learned, 0 is off."),
                **times("The picture is"),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "Takes the picture over where the mask is white, by half where it is grey, and not "
                        "where it is black. In the shape of the picture to make; one for all or one for each."
                    },
                ),
                "combine": (
                    list(COMBINE),
                    {
                        "default": "concatenate",
                        "tooltip": "What becomes of several pictures. concatenate: all are read side by side. average: "
                        "a mixture of them is read. one each: the first is for the first picture that is made, the "
                        "second for the second and so on.",
                    },
                ),
                **{name: strength(f"Multiplies weight in {where}") for name, where in GROUPS.items()},
            },
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
        mask: Tensor | None = None,
        combine: str = "concatenate",
        down_outer: float = 1.0,
        down_inner: float = 1.0,
        up_inner: float = 1.0,
        up_outer: float = 1.0,
    ) -> dict[str, Any]:
        from ..cascade_ops.attachments import COMBINE, apply_ip_adapter, check_ip_adapter, combined
        from ..cascade_ops.control_inputs import as_channels_first
        from ..cascade_ops.vision import encode_pictures

        check_ip_adapter(stage_c, ip_adapter)
        pictures = as_channels_first(image)
        runtime.check_interrupted()
        (image_encoder,) = runtime.placed([image_encoder])
        embeddings = encode_pictures(image_encoder, pictures).cpu()
        groups = (down_outer, down_inner, up_inner, up_outer)
        applied = apply_ip_adapter(
            stage_c,
            ip_adapter,
            combined(embeddings, combine),
            weight,
            start,
            end,
            mask,
            # A Stage C of other levels has other groups, and these say nothing where all of them are 1.
            () if set(groups) == {1.0} else groups,
        )
        said = applied.ip_adapters[-1].describe()
        if len(pictures) > 1:
            said += f", {len(pictures)} pictures {COMBINE[combine]}"
        return {"ui": {"text": [said]}, "result": (applied,)}
