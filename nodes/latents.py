"""Nodes that make latents and turn them into pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import runtime

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_ops.handles import StageHandle

CATEGORY = "cascade/latent"


def _pixels(side: str) -> tuple:
    return (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": 16384,
            "step": 8,
            "tooltip": f"{side} of the picture in pixels; any number works. 0 uses the model's own (1024 for the "
            "release). Sides from 1024 to about 2000 suit the release best.",
        },
    )


def tile_input(does: str) -> tuple:
    """The input of a node that runs Stage A in tiles."""
    return (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": 16384,
            "step": 64,
            "tooltip": f"For pictures that do not fit into memory: {does} tiles of so many pixels a side, one after "
            "the other. The result is the same, without seams. 0 is the whole picture at once where that fits, else "
            "the largest tiles that do.",
        },
    )


class CascadeEmptyLatent:
    DESCRIPTION = "Says how large the picture will be and how many to make: an empty latent for Stage C."
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Empty Stage C latent that remembers the size in pixels, for 'Cascade: sample Stage C'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_c": (
                    "CASCADE_STAGE_C",
                    {"tooltip": "The model that will be sampled, for its own size, from 'Cascade: load Stage C'."},
                ),
                "width": _pixels("Width"),
                "height": _pixels("Height"),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 4096, "tooltip": "How many pictures to make at once."},
                ),
            },
            "optional": {
                "compression": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 4096.0,
                        "step": 0.01,
                        "round": 0.01,
                        "tooltip": "How many pixels one cell of Stage C's latent stands for. Higher keeps large "
                        "pictures in one piece instead of repeating objects; 'Cascade: propose size' knows how high. 0 "
                        "is the published 42.67; otherwise at least 4.",
                    },
                ),
            },
        }

    def make(
        self, stage_c: StageHandle, width: int, height: int, batch_size: int, compression: float = 0.0
    ) -> dict[str, Any]:
        from ..cascade_ops import sizes, stages

        latent = stages.empty_latent(stage_c, width, height, batch_size, compression)
        rows, columns = latent.samples.shape[-2:]
        said = [f"{latent.width} x {latent.height} pixels, Stage C latent {columns} x {rows}, batch of {batch_size}"]
        cells = stages.trained_cells(stage_c)
        if max(rows, columns) > cells[1]:
            proposed = sizes.proposed_compression(latent.height, latent.width, cells)
            said.append(
                f"more than the {cells[1]} cells that {stage_c.title} was trained on, so objects may repeat: "
                f"compression {proposed:g} avoids that"
            )
        return {"ui": {"text": said}, "result": (latent.to_wire(),)}


class CascadeDecodeStageA:
    DESCRIPTION = "Turns the latent of Stage B into the finished picture, in exactly the size that was asked for."
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The finished pictures.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_a": ("CASCADE_STAGE_A", {"tooltip": "The model, from 'Cascade: load Stage A'."}),
                "latent": ("LATENT", {"tooltip": "Stage B latent, from 'Cascade: sample Stage B'."}),
            },
            "optional": {"tile": tile_input("decodes")},
        }

    def decode(self, stage_a: StageHandle, latent: dict, tile: int = 0) -> tuple[Tensor] | dict[str, Any]:
        from ..cascade_ops import memory, stages, tiles, wires

        runtime.check_interrupted()
        read = wires.read_latent(latent, "stage_b")
        shape = read.samples.shape
        (stage_a,) = runtime.placed([stage_a], memory.decoding_bytes(stage_a, shape, tile))
        tile, said = memory.fitting_tile(stage_a, shape, tile)
        bar = runtime.progress(len(read.samples) * tiles.tile_count(shape[2:], tile))
        pictures = stages.decode_stage_a(stage_a, read, bar.update, tile)
        # A line under the node takes room in the graph: only where there is something to say.
        return {"ui": {"text": said}, "result": (pictures,)} if said else (pictures,)


class CascadePreviewLatent:
    DESCRIPTION = (
        "Shows the latent of Stage C as a small picture without Stage B and Stage A: quick to choose a seed with."
    )
    CATEGORY = CATEGORY
    FUNCTION = "preview"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("Small pictures, 8 pixels for each cell of the latent: 192 x 192 for 1024 x 1024.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "previewer": ("CASCADE_PREVIEWER", {"tooltip": "The model, from 'Cascade: load previewer'."}),
                "latent": ("LATENT", {"tooltip": "Stage C latent, from 'Cascade: sample Stage C'."}),
            },
            "optional": {
                "numbered": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Writes its number into the corner of each picture, counted from 0, to choose some "
                        "with 'Cascade: select latents'.",
                    },
                )
            },
        }

    def preview(self, previewer: StageHandle, latent: dict, numbered: bool = False) -> tuple[Tensor]:
        from ..cascade_ops import memory, numbering, stages, wires

        read = wires.read_latent(latent)
        (previewer,) = runtime.placed([previewer], memory.preview_bytes(previewer, read.samples.shape))
        pictures = stages.preview_latent(previewer, read)
        return (numbering.numbered(pictures) if numbered else pictures,)
