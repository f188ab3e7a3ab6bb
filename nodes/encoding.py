"""Nodes that turn pictures into latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import runtime
from .latents import tile_input

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_ops.framing import Fit, Resize
    from ..cascade_ops.handles import StageHandle
    from ..cascade_ops.wires import Latent

CATEGORY = "cascade/latent"

_MASK = (
    "MASK",
    {
        "tooltip": "The part to make anew, of the picture's shape; the rest is held. It goes into the latent as its "
        "noise mask. From 'Cascade: feather mask', or of a picture with transparency."
    },
)


class CascadeEncodeStageC:
    DESCRIPTION = (
        "Turns a picture into a latent for Stage C, to change it (start below 1 in 'Cascade: sample Stage C'), to make "
        "a part of it anew (with a mask), or to hand it to Stage B as it is (reconstruction)."
    )
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT", "IMAGE", "MASK")
    RETURN_NAMES = ("latent", "image", "mask")
    OUTPUT_TOOLTIPS = (
        "Stage C latent that remembers the size in pixels, for 'Cascade: sample Stage C' or 'Cascade: sample Stage B'.",
        "The picture in that size, for 'Cascade: encode Stage A' and controls, so that all fit together.",
        "The mask in that size; 1 everywhere if none was given.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def pixels(side: str, other: str) -> tuple:
            tooltip = (
                f"{side} of the picture to make, in pixels; any number works. 0 follows from the {other} and the "
                "picture's shape. With 0 in both it is the picture's own size, but at most 2560 pixels on the longer "
                "side (256 with the tiny models)."
            )
            return ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": tooltip})

        return {
            "required": {
                "latent_encoder": (
                    "CASCADE_LATENT_ENCODER",
                    {"tooltip": "The model, from 'Cascade: load latent encoder'."},
                ),
                "image": ("IMAGE", {"tooltip": "The picture, or several of one size."}),
                "width": pixels("Width", "height"),
                "height": pixels("Height", "width"),
                "fit": (
                    ["crop", "stretch"],
                    {
                        "default": "crop",
                        "tooltip": "For a picture of another shape than width and height: crop takes its middle, "
                        "stretch all of it.",
                    },
                ),
            },
            "optional": {
                "mask": _MASK,
                "resize": (
                    ["smooth", "nearest"],
                    {
                        "default": "smooth",
                        "tooltip": "How the picture is made as small as the encoder reads it. smooth suits pictures "
                        "best; nearest takes single pixels, as the release's notebook for reconstruction does.",
                    },
                ),
                "compression": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 256.0,
                        "step": 0.01,
                        "round": 0.01,
                        "tooltip": "Pixels of the picture per cell of Stage C, as in 'Cascade: empty latent'. 0 is the "
                        "published 42.67; higher allows for pictures larger than 2560 pixels.",
                    },
                ),
            },
        }

    def encode(
        self,
        latent_encoder: StageHandle,
        image: Tensor,
        width: int,
        height: int,
        fit: Fit,
        mask: Tensor | None = None,
        resize: Resize = "smooth",
        compression: float = 0.0,
    ) -> dict[str, Any]:
        import torch

        from ..cascade_ops import encoding, memory, sizes

        runtime.check_interrupted()
        frame = encoding.stage_c_frame(latent_encoder, image, width, height, fit, compression)
        seen = sizes.encoder_picture_size(*sizes.stage_c_size(frame.height, frame.width, compression))
        (placed,) = runtime.placed([latent_encoder], memory.encoding_bytes(latent_encoder, seen))
        latent = encoding.encode_stage_c(
            placed,
            image,
            width,
            height,
            fit=fit,
            resize=resize,
            compression=compression,
            mask=mask,
            callback=runtime.progress(len(image)).update,
        )
        rows, columns = latent.samples.shape[-2:]
        said = [f"{frame.width} x {frame.height} pixels, Stage C latent {columns} x {rows}, batch of {len(image)}"]
        if frame.cuts:
            said.append(f"of {image.shape[2]} x {image.shape[1]} the middle {frame.columns} x {frame.rows}")
        masks = torch.ones(1, frame.height, frame.width) if latent.mask is None else latent.mask[:, 0]
        said += _masked(latent)
        return {"ui": {"text": said}, "result": (latent.to_wire(), frame.image(image), masks)}


class CascadeEncodeStageA:
    DESCRIPTION = (
        "Turns a picture into a latent for Stage B, for 'Cascade: sample Stage B' as its start_latent: to refine the "
        "picture (start below 1), or to hold it outside of a mask."
    )
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = (
        "Stage B latent, for the start_latent of 'Cascade: sample Stage B' or 'Cascade: decode Stage A'.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_a": ("CASCADE_STAGE_A", {"tooltip": "The model, from 'Cascade: load Stage A'."}),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "The picture, in the size that Stage B makes: connect the image that comes out of "
                        "'Cascade: encode Stage C'."
                    },
                ),
            },
            "optional": {"mask": _MASK, "tile": tile_input("encodes")},
        }

    def encode(self, stage_a: StageHandle, image: Tensor, mask: Tensor | None = None, tile: int = 0) -> dict[str, Any]:
        from ..cascade_ops import encoding, memory, sizes, tiles

        runtime.check_interrupted()
        shape = (1, 4, *sizes.stage_b_size(*image.shape[1:3]))
        (stage_a,) = runtime.placed([stage_a], memory.autoencoding_bytes(stage_a, shape, tile))
        tile, tiled = memory.fitting_tile(stage_a, shape, tile, memory.autoencoding_bytes)
        bar = runtime.progress(len(image) * tiles.tile_count(shape[2:], tile))
        latent = encoding.encode_stage_a(stage_a, image, mask=mask, callback=bar.update, tile=tile)
        rows, columns = latent.samples.shape[-2:]
        said = [f"{latent.width} x {latent.height} pixels, Stage B latent {columns} x {rows}, batch of {len(image)}"]
        return {"ui": {"text": said + tiled + _masked(latent)}, "result": (latent.to_wire("stage_b"),)}


def _masked(latent: Latent) -> list[str]:
    if latent.mask is None:
        return []
    share = latent.mask[..., : latent.height, : latent.width].mean().item()
    return [f"{share:.1%} of the picture is to be made anew"]
