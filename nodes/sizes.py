"""The node that proposes the size of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle

ASPECTS = (
    "1:1",
    "5:4",
    "4:3",
    "3:2",
    "16:10",
    "16:9",
    "2:1",
    "21:9",
    "4:5",
    "3:4",
    "2:3",
    "10:16",
    "9:16",
    "1:2",
    "9:21",
)
CUSTOM = "custom"
# As ComfyUI's nodes count them: 1024 x 1024 is one.
MEGAPIXEL = 1024 * 1024
MOST_PIXELS = 16384


class CascadeProposeSize:
    DESCRIPTION = (
        "Works out width, height and compression for the shape and size of picture you want, so that large pictures "
        "do not repeat their objects."
    )
    CATEGORY = "cascade/latent"
    FUNCTION = "propose"
    RETURN_TYPES = ("INT", "INT", "FLOAT")
    RETURN_NAMES = ("width", "height", "compression")
    OUTPUT_TOOLTIPS = (
        "Width of the picture in pixels, for 'Cascade: empty latent'.",
        "Height of the picture in pixels, for 'Cascade: empty latent'.",
        "Pixels per cell of Stage C's latent, for 'Cascade: empty latent': 42.67, or more for large pictures.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 0, "min": 0, "max": MOST_PIXELS, "step": 8}
        return {
            "required": {
                "stage_c": (
                    "CASCADE_STAGE_C",
                    {
                        "tooltip": "The model that will be sampled, for the sizes that it knows, from 'Cascade: load "
                        "Stage C'."
                    },
                ),
                "aspect": (
                    [*ASPECTS, CUSTOM],
                    {
                        "default": "1:1",
                        "tooltip": "Shape of the picture, width to height. custom takes it from custom_width and "
                        "custom_height.",
                    },
                ),
                "megapixels": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 256.0,
                        "step": 0.25,
                        "round": 0.01,
                        "tooltip": "How large the picture is, before scale; 1 is 1024 x 1024, 4 is 2048 x 2048. 0 is "
                        "the model's own size (1 for the release), or with custom the width and height given there.",
                    },
                ),
                "scale": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.1,
                        "max": 16.0,
                        "step": 0.25,
                        "round": 0.01,
                        "tooltip": "Makes it so many times as wide and as high: with megapixels 0, 2 is twice the "
                        "model's own size (2048 x 2048 for the release).",
                    },
                ),
            },
            "optional": {
                "custom_width": ("INT", {**side, "tooltip": "Width in pixels for the aspect 'custom'; else 0."}),
                "custom_height": ("INT", {**side, "tooltip": "Height in pixels for the aspect 'custom'; else 0."}),
                "multiple_of": (
                    "INT",
                    {
                        "default": 8,
                        "min": 8,
                        "max": 256,
                        "step": 8,
                        "tooltip": "Width and height become multiples of this. 8 keeps the shape best; 64 fits all "
                        "levels of Stage B evenly.",
                    },
                ),
            },
        }

    def propose(
        self,
        stage_c: StageHandle,
        aspect: str,
        megapixels: float,
        scale: float,
        custom_width: int = 0,
        custom_height: int = 0,
        multiple_of: int = 8,
    ) -> dict[str, Any]:
        from ..cascade_ops import sizes, stages

        wide, high = _shape(aspect, custom_width, custom_height)
        if aspect == CUSTOM and not megapixels:
            area = float(wide * high)
        else:
            own_width, own_height = stages.own_size(stage_c)
            area = megapixels * MEGAPIXEL or own_width * own_height
        height, width = sizes.proposed_size(wide / high, area * scale**2, multiple_of)
        if max(width, height) > MOST_PIXELS:
            raise ValueError(
                f"{width} x {height} pixels were asked for, expected sides of at most {MOST_PIXELS}: lower megapixels "
                "or scale."
            )
        cells = stages.trained_cells(stage_c)
        compression = sizes.proposed_compression(height, width, cells)
        rows, columns = sizes.stage_c_size(height, width, compression)
        said = [f"{width} x {height} pixels, compression {compression:g}, Stage C {columns} x {rows}"]
        if compression > sizes.STAGE_B_COMPRESSIONS[1]:
            said.append(
                f"Stage B was trained up to a compression of {sizes.STAGE_B_COMPRESSIONS[1]:g}: expect fewer details"
            )
        return {"ui": {"text": said}, "result": (width, height, compression)}


def _shape(aspect: str, custom_width: int, custom_height: int) -> tuple[int, int]:
    """Width and height as a ratio."""
    if aspect == CUSTOM:
        if not custom_width or not custom_height:
            raise ValueError(
                f"The aspect is custom and its size is {custom_width} x {custom_height}, expected both above 0: set "
                "custom_width and custom_height."
            )
        return custom_width, custom_height
    if custom_width or custom_height:
        raise ValueError(
            f"custom_width is {custom_width} and custom_height {custom_height}, which have no effect with the aspect "
            f"{aspect}: set both to 0, or choose custom."
        )
    wide, high = aspect.split(":")
    return int(wide), int(high)
