"""A node that gives the pictures which come with this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parents[1] / "workflows" / "examples"


class CascadeExampleImage:
    DESCRIPTION = (
        "A picture that comes with these nodes, so that an example runs on any machine. Put 'Load Image' in its place "
        "for a picture of your own: its outputs are the same."
    )
    CATEGORY = "cascade/image"
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "mask")
    OUTPUT_TOOLTIPS = ("The picture.", "Its transparent part, 1 where it is; only 'hole' has one.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = sorted(path.stem for path in FOLDER.glob("*.png"))
        return {
            "required": {
                "picture": (
                    names,
                    {
                        "default": "circle",
                        "tooltip": "Drawings such as the tiny models know, 256 pixels wide and high; 'small' has 128, "
                        "and 'hole' lacks its middle.",
                    },
                )
            }
        }

    def load(self, picture: str) -> tuple[Tensor, Tensor]:
        import numpy as np
        import torch
        from PIL import Image

        with Image.open(FOLDER / f"{picture}.png") as file:
            pixels = np.asarray(file.convert("RGBA"), np.float32) / 255
        found = torch.from_numpy(pixels)[None]
        return found[..., :3].contiguous(), 1 - found[..., 3]
