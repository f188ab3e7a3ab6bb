"""Nodes that prepare masks for inpainting and pictures for outpainting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import runtime

if TYPE_CHECKING:
    from torch import Tensor

CATEGORY = "cascade/image"


class CascadeFeatherMask:
    DESCRIPTION = (
        "Makes the masked part larger or smaller and gives it a soft edge, so that what is made anew joins the rest "
        "without a seam."
    )
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("MASK",)
    RETURN_NAMES = ("mask",)
    OUTPUT_TOOLTIPS = ("The mask with a soft edge.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "The part to make anew. What is masked at least a half counts, unless grow and "
                        "feather are both 0."
                    },
                ),
                "grow": (
                    "INT",
                    {
                        "default": 0,
                        "min": -1024,
                        "max": 1024,
                        "tooltip": "Pixels by which the part grows on all sides; below 0 it shrinks.",
                    },
                ),
                "feather": (
                    "INT",
                    {
                        "default": 32,
                        "min": 0,
                        "max": 1024,
                        "tooltip": "Pixels over which the mask falls from 1 to 0 outside of the part. For 1024 x 1024, "
                        "begin with 32 to 64; a cell of Stage C is 43 pixels wide.",
                    },
                ),
            }
        }

    def make(self, mask: Tensor, grow: int, feather: int) -> dict[str, Any]:
        from ..cascade_ops.masks import feathered

        runtime.check_interrupted()
        made = feathered(mask.reshape(-1, *mask.shape[-2:]), grow, feather)
        before, after = ((each >= 0.5).float().mean().item() for each in (mask, made))
        said = f"{before:.1%} of the picture was masked, now {after:.1%}, with an edge of {feather} pixels"
        return {"ui": {"text": [said]}, "result": (made,)}


class CascadePadForOutpainting:
    DESCRIPTION = (
        "Adds a border around a picture, to make it larger (outpainting): the pixels of its edge go on in the border, "
        "and the mask says what is to be made anew."
    )
    CATEGORY = CATEGORY
    FUNCTION = "pad"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "mask")
    OUTPUT_TOOLTIPS = (
        "The picture with its border, for 'Cascade: inpaint control' and 'Cascade: encode Stage C'.",
        "The new border: 1 there, falling to 0 inside of the old picture.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def side(name: str, default: int = 0) -> tuple:
            tooltip = f"How many pixels the picture grows {name}."
            return ("INT", {"default": default, "min": 0, "max": 16384, "step": 8, "tooltip": tooltip})

        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture to make larger."}),
                "left": side("on the left", 256),
                "top": side("at the top"),
                "right": side("on the right", 256),
                "bottom": side("at the bottom"),
                "feather": (
                    "INT",
                    {
                        "default": 32,
                        "min": 0,
                        "max": 1024,
                        "tooltip": "Pixels over which the mask falls from 1 to 0 inside of the old picture, so that "
                        "the border joins it without a seam. 0 keeps the old picture whole.",
                    },
                ),
            }
        }

    def pad(self, image: Tensor, left: int, top: int, right: int, bottom: int, feather: int) -> dict[str, Any]:
        from ..cascade_ops.masks import padded_for_outpainting

        runtime.check_interrupted()
        padded, mask = padded_for_outpainting(image, left, top, right, bottom, feather)
        (old_height, old_width), (height, width) = image.shape[1:3], padded.shape[1:3]
        return {
            "ui": {"text": [f"{old_width} x {old_height} became {width} x {height}, {mask.mean().item():.1%} is new"]},
            "result": (padded, mask),
        }
