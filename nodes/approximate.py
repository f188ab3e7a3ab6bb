"""Nodes that trade exactness for speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle

CATEGORY = "cascade/speed"


class CascadeReuseInnerBlocks:
    DESCRIPTION = (
        "An approximation: makes Stage B faster and its detail a little different. The inner blocks of the network "
        "change little from step to step, so some steps take what an earlier one computed. The Stage B that went in "
        "stays exact."
    )
    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("CASCADE_STAGE_B",)
    RETURN_NAMES = ("stage_b",)
    OUTPUT_TOOLTIPS = ("Stage B that reuses its inner blocks, for 'Cascade: sample Stage B'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def time(default: float, tooltip: str) -> tuple:
            options = {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001, "tooltip": tooltip}
            return ("FLOAT", options)

        return {
            "required": {
                "stage_b": ("CASCADE_STAGE_B", {"tooltip": "The model, from 'Cascade: load Stage B'."}),
                "every": (
                    "INT",
                    {
                        "default": 2,
                        "min": 2,
                        "max": 100,
                        "tooltip": "Inner blocks are computed in one of so many steps. More is faster and differs "
                        "more from the exact picture.",
                    },
                ),
                "outer_levels": (
                    "INT",
                    {
                        "default": 2,
                        "min": 1,
                        "max": 16,
                        "tooltip": "How many levels of the network, from the outermost on, are computed in every step. "
                        "More is slower and closer to the exact picture; Stage B has four, so 3 is the most.",
                    },
                ),
                "start": time(
                    1.0,
                    "Inner blocks are reused from this time on. Time runs from 1 (noise) to 0 (picture); 1 is from the "
                    "first step on.",
                ),
                "end": time(
                    0.0, "Inner blocks are reused up to this time; later steps are exact. 0 is up to the last step."
                ),
            }
        }

    def apply(self, stage_b: StageHandle, every: int, outer_levels: int, start: float, end: float) -> dict[str, Any]:
        from ..cascade_ops.reuse import InnerReuse, reuse_inner

        applied = reuse_inner(stage_b, InnerReuse(every, outer_levels, start, end))
        said = f"approximation: {applied.title} {applied.reuse.describe()}"
        return {"ui": {"text": [said]}, "result": (applied,)}
