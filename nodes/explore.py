"""The node that chooses pictures out of a batch."""

from __future__ import annotations

from typing import Any


class CascadeSelectLatents:
    DESCRIPTION = (
        "Takes some pictures out of a batch, by their numbers: sample many with Stage C, which is quick, look at them "
        "with 'Cascade: preview latent', and finish only those that you like."
    )
    CATEGORY = "cascade/latent"
    FUNCTION = "select"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The chosen latents, each with its own seed, for 'Cascade: sample Stage B'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": "A batch of latents, from 'Cascade: sample Stage C' for one."}),
                "indexes": (
                    "STRING",
                    {
                        "default": "0",
                        "tooltip": "Which pictures, counted from 0, as in 0, 3, 5-7. 'numbered' of 'Cascade: preview "
                        "latent' writes these numbers on the pictures. They come out in the order written here.",
                    },
                ),
            }
        }

    def select(self, latent: dict, indexes: str) -> dict[str, Any]:
        from ..cascade_ops import selection, wires

        # A latent of Stage B goes through unchanged too: read so, its values are not scaled.
        read = wires.read_latent(latent)
        chosen = selection.read_indexes(indexes, len(read.samples))
        said = f"{len(chosen)} of {len(read.samples)}: {', '.join(map(str, chosen))}"
        return {"ui": {"text": [said]}, "result": (selection.select(read, chosen).to_wire(),)}
