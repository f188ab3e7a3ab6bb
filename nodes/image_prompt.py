"""A node that lets a picture speak in a conditioning, beside the words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import runtime
from .control import strength

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_ops.handles import StageHandle


class CascadeImagePrompt:
    DESCRIPTION = (
        "Adds a picture to a prompt: Stage C makes a new picture of what is in it, beside what the words say. Its "
        "content and its look are read, hardly where things are. Put several one after another to mix pictures."
    )
    CATEGORY = "cascade/conditioning"
    FUNCTION = "add"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The prompt with the picture, for positive or negative of 'Cascade: sample Stage C'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..cascade_ops.vision import CROPS

        return {
            "required": {
                "conditioning": (
                    "CONDITIONING",
                    {
                        "tooltip": "The prompt to add the picture to, from 'Cascade: encode text'. An empty text "
                        "leaves everything to the picture."
                    },
                ),
                "weight": strength(
                    "How far to go towards the picture. 0 is off, 0.5 is halfway, 1 is what Stage C learned. Above 1 "
                    "the picture speaks over the words; beyond 2 it breaks."
                ),
                "crop": (
                    list(CROPS),
                    {
                        "default": "center",
                        "tooltip": "What is seen of a picture that is not square. center: the square in its middle, "
                        "as the release does. pad: all of it, with a plain border. stretch: all of it, squeezed.",
                    },
                ),
            },
            "optional": {
                "image_encoder": (
                    "CASCADE_IMAGE_ENCODER",
                    {"tooltip": "Turns the picture into what Stage C reads, from 'Cascade: load image encoder'."},
                ),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "The picture that speaks. Several in a batch are read together for every picture "
                        "that is made."
                    },
                ),
                "clip_vision_output": (
                    "CLIP_VISION_OUTPUT",
                    {
                        "tooltip": "In place of image and image_encoder: a picture that ComfyUI's 'CLIP Vision Encode' "
                        "has encoded, with CLIP ViT-L/14."
                    },
                ),
            },
        }

    def add(
        self,
        conditioning: list,
        weight: float,
        crop: str,
        image_encoder: StageHandle | None = None,
        image: Tensor | None = None,
        clip_vision_output: Any = None,
    ) -> dict[str, Any]:
        from ..cascade_ops.image_prompts import ClipVisionOutput, add_pictures

        _check_one_way(crop, image_encoder, image, clip_vision_output)
        said = "no picture: the weight is 0"
        if weight:  # Encoding a picture that is left out would only cost time.
            if clip_vision_output is None:
                clip_vision_output = ClipVisionOutput(_encoded(image_encoder, image, crop))
            conditioning = add_pictures(conditioning, clip_vision_output, weight)
            count = len(clip_vision_output.image_embeds)
            said = f"{count} {'picture' if count == 1 else 'pictures'} at {weight:g}"
        return {"ui": {"text": [said]}, "result": (conditioning,)}


def _check_one_way(crop: str, image_encoder: Any, image: Any, clip_vision_output: Any) -> None:
    """ValueError unless the picture comes in exactly one way."""
    given = {"image_encoder": image_encoder, "image": image}
    found = [name for name, value in given.items() if value is not None]
    if clip_vision_output is None:
        if len(found) < len(given):
            missing = " and ".join(name for name in given if name not in found)
            raise ValueError(
                f"No picture can be read without {missing}, expected image with image_encoder, or clip_vision_output "
                "alone: connect one of these."
            )
        return
    if found:
        raise ValueError(
            f"The picture comes in two ways, as clip_vision_output and as {' and '.join(found)}, expected one: "
            "disconnect one of them (two pictures are two nodes, one after the other)."
        )
    if crop != "center":
        raise ValueError(
            f"crop is '{crop}' and the picture comes as clip_vision_output, which was cropped where it was encoded: "
            "set crop to center, or connect image and image_encoder instead."
        )


def _encoded(image_encoder: StageHandle, image: Tensor, crop: str) -> Tensor:
    """Embeddings ``[k, E]`` of the pictures, in main memory."""
    from ..cascade_ops.control_inputs import as_channels_first
    from ..cascade_ops.vision import encode_pictures

    pictures = as_channels_first(image)
    runtime.check_interrupted()
    (encoder,) = runtime.placed([image_encoder])
    return encode_pictures(encoder, pictures, crop)[:, 0].cpu()
