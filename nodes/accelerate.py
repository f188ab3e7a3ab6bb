"""Nodes that make a stage run faster with the same result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import runtime
from .approximate import CATEGORY

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle

_GRAPH = (
    "cuda graph: one step for each size of picture is recorded on the GPU and replayed, which helps where the pictures "
    "are small; the picture is the same. "
)
_COMPILE = (
    "torch.compile: a compiler makes faster code in the first run with each size of picture, which takes from seconds "
    "to minutes; the picture differs by rounding."
)


class _Accelerate:
    """Stage in, stage out; the classes below say which."""

    CATEGORY = CATEGORY
    FUNCTION = "apply"
    STAGE = ""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..cascade_ops.acceleration import AUTO, CUDA_GRAPH, methods_for

        methods = methods_for(cls.STAGE)
        if CUDA_GRAPH in methods:
            auto = "auto: recorded steps on a GPU, nothing elsewhere; the node says which. "
            tooltip = f"How it becomes faster. {auto}{_GRAPH}{_COMPILE}"
        else:
            tooltip = f"How it becomes faster. auto: nothing, and the node says why. {_COMPILE}"
        title = cls.STAGE.replace("stage_", "Stage ")[:-1] + cls.STAGE[-1].upper()
        return {
            "required": {
                cls.STAGE: (
                    f"CASCADE_{cls.STAGE.upper()}",
                    {"tooltip": f"The model, from 'Cascade: load {title}'. It stays as it was."},
                ),
                "method": (list(methods), {"default": AUTO, "tooltip": tooltip}),
            }
        }

    def apply(self, method: str, **stages: StageHandle) -> dict[str, Any]:
        from ..cascade_ops.acceleration import accelerated

        handle = stages[self.STAGE].expect(self.STAGE)
        result, words = accelerated(handle, method, runtime.device(self.STAGE))
        return {"ui": {"text": [words]}, "result": (result,)}


class CascadeAccelerateStageC(_Accelerate):
    DESCRIPTION = "Makes sampling Stage C faster with the same picture: recorded steps on a GPU, or compiled code."
    RETURN_TYPES = ("CASCADE_STAGE_C",)
    RETURN_NAMES = ("stage_c",)
    OUTPUT_TOOLTIPS = ("Stage C that runs this way, for 'Cascade: sample Stage C'.",)
    STAGE = "stage_c"


class CascadeAccelerateStageB(_Accelerate):
    DESCRIPTION = "Makes sampling Stage B faster with the same picture: recorded steps on a GPU, or compiled code."
    RETURN_TYPES = ("CASCADE_STAGE_B",)
    RETURN_NAMES = ("stage_b",)
    OUTPUT_TOOLTIPS = ("Stage B that runs this way, for 'Cascade: sample Stage B'.",)
    STAGE = "stage_b"


class CascadeAccelerateStageA(_Accelerate):
    DESCRIPTION = "Makes decoding with Stage A faster with the same picture, by compiled code."
    RETURN_TYPES = ("CASCADE_STAGE_A",)
    RETURN_NAMES = ("stage_a",)
    OUTPUT_TOOLTIPS = ("Stage A that runs this way, for 'Cascade: decode Stage A'.",)
    STAGE = "stage_a"
