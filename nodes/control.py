"""Nodes that steer Stage C by a picture: ControlNets and what they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import runtime
from .files import WHERE, choices
from .loaders import CATEGORY as LOADERS
from .loaders import _LoadStage

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_ops.control_inputs import ControlInput
    from ..cascade_ops.handles import StageHandle

CATEGORY = "cascade/control"


class CascadeLoadControlNet(_LoadStage):
    STAGE = "controlnet"
    CATEGORY = LOADERS
    DESCRIPTION = (
        "Loads a ControlNet, which makes Stage C follow a picture: its edges, what surrounds a hole in it, a smaller "
        "version of it, or the faces in it. What it follows is recognised from the file."
    )
    RETURN_TYPES = ("CASCADE_CONTROLNET",)
    RETURN_NAMES = ("controlnet",)
    OUTPUT_TOOLTIPS = ("The ControlNet, for 'Cascade: apply ControlNet'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "auto takes the best ControlNet of that kind that fits the Stage C which auto would take, by looking into "
            f"the files, else the tiny one that comes with these nodes. Files go into models/{WHERE['controlnet']}; "
            "with one of them, its kind is recognised."
        )
        return {"required": {"file": (choices("controlnet"), {"default": "auto (canny)", "tooltip": tooltip})}}


class CascadeCannyControl:
    DESCRIPTION = "Finds the edges of a picture, for a canny ControlNet: the new picture has the same outlines."
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("CASCADE_CONTROL", "IMAGE")
    RETURN_NAMES = ("control", "image")
    OUTPUT_TOOLTIPS = (
        "The edges, for 'Cascade: apply ControlNet' with a canny ControlNet.",
        "The edges as a picture, to look at: white on black.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def threshold(default: int, tooltip: str) -> tuple:
            return ("INT", {"default": default, "min": 0, "max": 2040, "tooltip": tooltip})

        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture whose outlines to follow."}),
                "low": threshold(
                    100, "Weaker edges than this are left out. Lower finds more; the release was trained with 100."
                ),
                "high": threshold(
                    200,
                    "Edges at least this strong count, and weaker ones only where they go on from them. Lower finds "
                    "more; the release was trained with 200.",
                ),
                "side": (
                    "INT",
                    {
                        "default": 224,
                        "min": 0,
                        "max": 8192,
                        "step": 8,
                        "tooltip": "Edges are looked for in the picture stretched to a square of so many pixels: "
                        "larger finds finer ones. The release was trained with 224; 0 is the picture's own size.",
                    },
                ),
            }
        }

    def make(self, image: Tensor, low: int, high: int, side: int) -> dict[str, Any]:
        from ..cascade_ops.control_inputs import canny_input

        control = canny_input(image, low, high, side)
        share = control.samples.mean().item()
        return made(control, control.picture(), f"{share:.1%} of the pixels are edges")


class CascadeInpaintControl:
    DESCRIPTION = (
        "Cuts a hole into a picture, for an inpainting ControlNet: the new picture fills the hole to suit what is "
        "around it. Pad a picture and mask the border to make it larger (outpainting)."
    )
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("CASCADE_CONTROL", "IMAGE")
    RETURN_NAMES = ("control", "image")
    OUTPUT_TOOLTIPS = (
        "Picture and hole, for 'Cascade: apply ControlNet' with an inpainting ControlNet.",
        "The picture with its hole in white, to look at.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture to change a part of."}),
                "mask": (
                    "MASK",
                    {
                        "tooltip": "The part to make anew, as large as the picture. What is at least half masked is "
                        "cut out; the ControlNet sees the rest."
                    },
                ),
            }
        }

    def make(self, image: Tensor, mask: Tensor) -> dict[str, Any]:
        from ..cascade_ops.control_inputs import inpainting_input

        control = inpainting_input(image, mask)
        share = control.samples[:, 3].mean().item()
        return made(control, control.picture(), f"{share:.1%} of the picture is to be made anew")


class CascadeSuperResolutionControl:
    DESCRIPTION = (
        "Encodes a small picture, for a super-resolution ControlNet: the new picture is the same, larger and with more "
        "detail. Sample Stage C with guidance 1, as the release does."
    )
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("CASCADE_CONTROL", "IMAGE", "INT", "INT")
    RETURN_NAMES = ("control", "image", "width", "height")
    OUTPUT_TOOLTIPS = (
        "The small picture, encoded, for 'Cascade: apply ControlNet' with a super-resolution ControlNet.",
        "The small picture as it was encoded, its sides rounded up to multiples of 32. With a previewer, what the "
        "encoding has kept of it, which is all that the ControlNet knows.",
        "Width of the large picture, twice the small one's, for 'Cascade: empty latent'.",
        "Height of the large picture, twice the small one's, for 'Cascade: empty latent'.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent_encoder": (
                    "CASCADE_LATENT_ENCODER",
                    {"tooltip": "Encodes the picture, from 'Cascade: load latent encoder'."},
                ),
                "image": (
                    "IMAGE",
                    {"tooltip": "The small picture. The release takes 1024 x 1024 and makes 2048 x 2048 of it."},
                ),
            },
            "optional": {
                "previewer": (
                    "CASCADE_PREVIEWER",
                    {"tooltip": "Shows what the encoding has kept of the picture, from 'Cascade: load previewer'."},
                ),
            },
        }

    def make(self, latent_encoder: StageHandle, image: Tensor, previewer: StageHandle | None = None) -> dict[str, Any]:
        from ..cascade_ops.control_inputs import shown_by_previewer, super_resolution_input
        from ..cascade_ops.memory import encoding_bytes

        runtime.check_interrupted()
        needed = [latent_encoder] if previewer is None else [latent_encoder, previewer]
        latent_encoder, *shower = runtime.placed(needed, encoding_bytes(latent_encoder, image.shape[1:3]))
        control, shown = super_resolution_input(latent_encoder, image)
        height, width = image.shape[1:3]
        if shower:
            shown = shown_by_previewer(control, shower[0])
        return made(control, shown, f"twice as large is {2 * width} x {2 * height}", 2 * width, 2 * height)


class CascadeApplyControlNet:
    DESCRIPTION = (
        "Lets a ControlNet steer Stage C. The Stage C that comes out shares the weights of the one that went in, which "
        "stays as it was; several ControlNets can be applied one after another."
    )
    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("CASCADE_STAGE_C",)
    RETURN_NAMES = ("stage_c",)
    OUTPUT_TOOLTIPS = ("Stage C that follows the control, for 'Cascade: sample Stage C'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_c": ("CASCADE_STAGE_C", {"tooltip": "The model to steer, from 'Cascade: load Stage C'."}),
                "controlnet": ("CASCADE_CONTROLNET", {"tooltip": "The ControlNet, from 'Cascade: load ControlNet'."}),
                "control": (
                    "CASCADE_CONTROL",
                    {
                        "tooltip": "What to follow, of the ControlNet's kind: from 'Cascade: canny control', 'Cascade: "
                        "inpaint control', 'Cascade: super-resolution control' or 'Cascade: face identity control'. Of "
                        "one picture, or of one for each that is made, in the shape of the picture to make."
                    },
                ),
                "strength": strength("How closely the control is followed. 1 is what it learned, 0 is off."),
                **times("The control is"),
            }
        }

    def apply(
        self,
        stage_c: StageHandle,
        controlnet: StageHandle,
        control: ControlInput,
        strength: float,
        start: float,
        end: float,
    ) -> dict[str, Any]:
        from ..cascade_ops.attachments import apply_control

        applied = apply_control(stage_c, controlnet, control, strength, start, end)
        return {"ui": {"text": [applied.controls[-1].describe()]}, "result": (applied,)}


def strength(tooltip: str) -> tuple:
    """The input for how much of something is applied."""
    return ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05, "round": 0.001, "tooltip": tooltip})


def times(what: str) -> dict[str, tuple]:
    """The inputs for the part of the schedule in which something acts; `what` begins the tooltips."""

    def time(default: float, tooltip: str) -> tuple:
        return ("FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001, "tooltip": tooltip})

    return {
        "start": time(
            1.0,
            f"{what} followed from this time on. Time runs from 1 (noise) to 0 (picture); 1 is from the first step on.",
        ),
        "end": time(
            0.0,
            f"{what} followed up to this time; later steps are free. 0 is up to the last step, 0.5 leaves the detail "
            "to the prompt.",
        ),
    }


def made(control: ControlInput, picture: Tensor, remark: str, *more: Any) -> dict[str, Any]:
    """What a node says and gives that made a control, with a picture of it to look at and `more` outputs."""
    height, width = control.size or control.samples.shape[-2:]
    said = f"control for {control.kind} of a picture of {width} x {height}: {remark}"
    return {"ui": {"text": [said]}, "result": (control, picture, *more)}
