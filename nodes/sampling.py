"""Nodes that sample Stage C and Stage B."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import runtime

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_ops.diffusion import StepInfo
    from ..cascade_ops.finished import FinishedPictures
    from ..cascade_ops.handles import StageHandle
    from ..cascade_ops.stages import SamplingSettings

    Show = Callable[[StepInfo], Tensor]

CATEGORY = "cascade/sampling"


def _required_settings(steps: int, own_guidance: str, seed: str) -> dict[str, tuple]:
    from ..cascade_ops.diffusion import SAMPLERS
    from ..cascade_ops.stages import AUTO_SAMPLER

    return {
        "seed": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 2**64 - 1,
                "control_after_generate": True,
                "tooltip": f"Another seed, another {seed}. Image 3 of a batch is the image made alone with seed + 3, "
                "counted from 0.",
            },
        ),
        "steps": (
            "INT",
            {
                "default": steps,
                "min": 1,
                "max": 1000,
                "tooltip": f"How often the model is asked. More steps take longer and help little past {2 * steps}; "
                f"the release uses {steps}.",
            },
        ),
        "guidance": (
            "FLOAT",
            {
                "default": 0.0,
                "min": 0.0,
                "max": 30.0,
                "step": 0.1,
                "round": 0.01,
                "tooltip": "How strictly the prompt is followed and the negative prompt avoided. 0 uses the model's "
                f"own value ({own_guidance} for the release), 1 switches guidance off and takes half the time.",
            },
        ),
        "sampler": (
            [*SAMPLERS, AUTO_SAMPLER],
            {
                "default": AUTO_SAMPLER,
                "tooltip": "How noise is removed. auto takes the one that the model's file names, ddpm where it names "
                "none. ddpm is what the release uses; ddim and euler add no noise on the way; dpmpp_2m does with half "
                "the steps; lcm keeps forms and loses texture where weights were not made for it.",
            },
        ),
    }


def _optional_settings(own_shift: str, start: str) -> dict[str, tuple]:
    def number(default: float, low: float, high: float, step: float, tooltip: str) -> tuple:
        return (
            "FLOAT",
            {"default": default, "min": low, "max": high, "step": step, "round": 0.001, "tooltip": tooltip},
        )

    return {
        "shift": number(
            0.0,
            0.0,
            16.0,
            0.1,
            "Spends more of the steps on composition (higher) or on detail (lower). 0 uses the model's own value "
            f"({own_shift} for the release), 1 is no shift.",
        ),
        "guidance_end": number(
            0.0,
            0.0,
            30.0,
            0.1,
            "Guidance in the last step: it changes evenly from guidance to this value. 0 keeps it the same throughout.",
        ),
        "guidance_from": number(
            1.0,
            0.0,
            1.0,
            0.01,
            "Guidance begins at this time. Time runs from 1 (noise) to 0 (picture); 1 is from the first step on.",
        ),
        "guidance_until": number(
            0.0, 0.0, 1.0, 0.01, "Guidance ends at this time; later steps are faster. 0 is up to the last step."
        ),
        "rescale": number(
            0.7,
            0.0,
            1.0,
            0.05,
            "Takes back contrast and colour that guidance adds too much of. 0 is off, 1 is all of it; the release "
            "uses 0.7.",
        ),
        "rescale_over": (
            ["image", "batch"],
            {
                "default": "image",
                "tooltip": "What rescale measures. image: each picture by itself. batch: all together as the release "
                "does, so that a picture depends on the others of its batch.",
            },
        ),
        "start": number(1.0, 0.0, 1.0, 0.01, start),
        "end": number(
            0.0,
            0.0,
            1.0,
            0.01,
            "Stops at this time and gives the picture as it is guessed there: softer above 0. 0 runs to the end.",
        ),
        "start_noise": (
            ["matched", "reference"],
            {
                "default": "matched",
                "tooltip": "For a start below 1. matched: as much noise as the model is told. reference: as the "
                "release's notebook, which leaves the shift out and so adds less than the model is told.",
            },
        ),
    }


def _pixels(tooltip: str) -> tuple:
    return ("INT", {"default": 0, "min": 0, "max": 16384, "step": 64, "tooltip": tooltip})


_POSITIVE = ("CONDITIONING", {"tooltip": "What the picture should show, from 'Cascade: encode text'."})
_NEGATIVE = (
    "CONDITIONING",
    {"tooltip": "What to stay away from, from 'Cascade: encode text'; the text may be empty. Not used at guidance 1."},
)


class CascadeSampleStageC:
    DESCRIPTION = (
        "Turns noise into a small latent picture of what the prompt says. This is where the content of the picture is "
        "decided; Stage B and Stage A then make it large."
    )
    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Stage C latent, 16 channels, for 'Cascade: sample Stage B' or 'Cascade: preview latent'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        start = (
            "Below 1, the given latent is changed instead of starting from noise: 0.8 changes much, 0.3 little "
            "(image to image). All steps are spent on the part that is left."
        )
        return {
            "required": {
                "stage_c": ("CASCADE_STAGE_C", {"tooltip": "The model, from 'Cascade: load Stage C'."}),
                "positive": _POSITIVE,
                "negative": _NEGATIVE,
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "Says the size and how many pictures, from 'Cascade: empty latent'. With a noise "
                        "mask, only the masked part is made anew."
                    },
                ),
                **_required_settings(20, "4.0", "picture"),
            },
            "optional": {
                "previewer": (
                    "CASCADE_PREVIEWER",
                    {"tooltip": "Shows the picture while it is made, from 'Cascade: load previewer'."},
                ),
                **_optional_settings("2.0", start),
            },
        }

    def sample(
        self,
        stage_c: StageHandle,
        positive: list,
        negative: list,
        latent: dict,
        seed: int,
        previewer: StageHandle | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        from ..cascade_ops import acceleration, memory, residency, stages, wires

        chosen = stages.SamplingSettings(**settings)
        start = wires.read_latent(latent)
        prompts = [wires.read_condition(positive, "positive"), wires.read_condition(negative, "negative")]
        pictures = [wires.read_pictures(positive, "positive"), wires.read_pictures(negative, "negative")]
        tokens = memory.condition_tokens(stage_c, prompts, pictures)
        bytes_needed = memory.sampling_bytes(stage_c, start.samples.shape, tokens)
        bytes_needed += memory.attached_bytes(stage_c, start.samples.shape)
        previewer, notes = _fitting(previewer, stage_c)
        if previewer is None:
            (stage_c,) = runtime.placed([stage_c], bytes_needed)
            show = _linear_preview(stage_c)
        else:
            bytes_needed += memory.preview_bytes(previewer, (1, *start.samples.shape[1:]))
            stage_c, shower = runtime.placed([stage_c, previewer], bytes_needed)

            def show(step: StepInfo) -> Tensor:
                return stages.preview_latent(shower, wires.Latent(step.denoised[:1]))[0]

        result = stages.sample_stage_c(
            stage_c,
            *prompts,
            start,
            seed=seed,
            settings=chosen,
            pictures=pictures[0],
            negative_pictures=pictures[1],
            callback=_report(chosen.steps, show),
        )
        notes += [f"with {each.describe()}" for each in (*stage_c.controls, *stage_c.ip_adapters)]
        notes += acceleration.notes(stage_c) + residency.streaming_note(stage_c)
        return {"ui": _said(stage_c, chosen, result.stage_c_pixels(), notes), "result": (result.to_wire(),)}


class CascadeSampleStageB:
    DESCRIPTION = "Adds detail: turns the small latent of Stage C into the larger one that Stage A decodes."
    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Stage B latent, 4 channels, for 'Cascade: decode Stage A'.",)

    # The host keeps a node's object from run to run; made with the first picture.
    _finished: FinishedPictures | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        start = (
            "Below 1, start_latent is refined instead of starting from noise: 0.5 keeps its larger forms, 0.2 changes "
            "little."
        )
        return {
            "required": {
                "stage_b": ("CASCADE_STAGE_B", {"tooltip": "The model, from 'Cascade: load Stage B'."}),
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "What to add detail to, from 'Cascade: sample Stage C'. The picture's size in "
                        "pixels comes with it."
                    },
                ),
                "positive": _POSITIVE,
                "negative": _NEGATIVE,
                **_required_settings(10, "1.1", "set of details"),
            },
            "optional": {
                "stage_a": (
                    "CASCADE_STAGE_A",
                    {"tooltip": "Shows a small picture while it is made, from 'Cascade: load Stage A'."},
                ),
                "start_latent": (
                    "LATENT",
                    {
                        "tooltip": "Stage B latent to refine, with start below 1; with a noise mask, only the masked "
                        "part is made anew."
                    },
                ),
                **_optional_settings("1.0", start),
                "window": _pixels(
                    "Samples a large picture in windows of so many pixels, one after the other, which takes less "
                    "memory and more time. 0 is the whole picture at once; 1024 suits the release.",
                ),
                "window_overlap": _pixels(
                    "Pixels that neighbouring windows share at least: more of them hide the borders better and take "
                    "longer. 0 is a quarter of the window.",
                ),
            },
        }

    def sample(
        self,
        stage_b: StageHandle,
        latent: dict,
        positive: list,
        negative: list,
        seed: int,
        stage_a: StageHandle | None = None,
        start_latent: dict | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        from ..cascade_ops import acceleration, finished, memory, residency, reuse, sizes, stages, wires

        chosen = stages.SamplingSettings(**settings)
        prior = wires.read_latent(latent)
        prompts = []
        for name, wire in (("positive", positive), ("negative", negative)):
            prompts.append(wires.read_condition(wire, name, "stage_b"))
            wires.check_prior(wire, name, prior)
        start = None if start_latent is None else wires.read_latent(start_latent, "stage_b")
        self._finished = self._finished or finished.FinishedPictures()
        plan = self._finished.plan(stage_b, finished.StageBRun(prior, *prompts, seed, chosen, start))
        shape = (len(plan.missing), 4, *sizes.stage_b_size(*prior.stage_c_pixels()))
        windows = stages.stage_b_windows(stage_b, prior, chosen)
        bytes_needed = memory.sampling_bytes(stage_b, shape, stage_b.module.c_clip_seq, largest=windows.largest)
        bytes_needed += reuse.kept_bytes(stage_b, len(plan.missing), windows)
        stage_a, notes = _fitting(stage_a, stage_b)
        if windows.total > 1:
            notes.append(f"in {len(windows.columns)} x {len(windows.rows)} windows of {chosen.window} pixels at most")
        reused = reuse.reused_steps(stage_b, chosen)
        if reused is not None:
            notes.append(reused.describe())
        show = None
        if not plan.missing:
            pass  # no model is needed
        elif stage_a is None:
            (stage_b,) = runtime.placed([stage_b], bytes_needed)
            show = _linear_preview(stage_b)
        else:
            bytes_needed += memory.decoding_bytes(stage_a, (1, 4, stages.PREVIEW_CELLS, stages.PREVIEW_CELLS))
            stage_b, shower = runtime.placed([stage_b, stage_a], bytes_needed)

            def show(step: StepInfo) -> Tensor:
                return stages.preview_stage_b(shower, step.denoised[:1])[0]

        result = plan.sample(stage_b, _report(chosen.steps, show), runtime.check_interrupted)
        if plan.kept:
            notes.append(f"{len(plan.kept)} of {len(prior.samples)} pictures kept from an earlier run")
        if plan.missing:
            notes += acceleration.notes(stage_b, windows.total > 1) + residency.streaming_note(stage_b)
        return {"ui": _said(stage_b, chosen, result.stage_b_pixels(), notes), "result": (result.to_wire("stage_b"),)}


def _fitting(shower: StageHandle | None, handle: StageHandle) -> tuple[StageHandle | None, list[str]]:
    """The model to make previews with if it fits the sampled one, and a note where it does not."""
    from ..cascade_ops.families import families_clash

    if shower is None or not families_clash(shower.family, handle.family):
        return shower, []
    return None, [f"no live previews from {shower.title}: it belongs to another family than {handle.title}"]


def _linear_preview(handle: StageHandle) -> Show | None:
    """Rough previews for the host that wants them, where no model was connected to make better ones with."""
    from ..cascade_ops.latent_preview import preview_map

    found = preview_map(handle.family, handle.stage) if runtime.shows_previews() else None
    return None if found is None else lambda step: found.show(step.denoised[:1])[0]


def _report(steps: int, show: Show | None) -> Callable[[StepInfo], None]:
    """A callback that moves the node's progress bar, shows the picture so far, and ends the run on an interruption."""
    from ..cascade_ops.stages import to_picture

    runtime.check_interrupted()
    bar = runtime.progress(steps)

    def report(step: StepInfo) -> None:
        bar.update(step.step + 1, None if show is None else to_picture(show(step)))

    return report


def _said(
    handle: StageHandle, settings: SamplingSettings, pixels: tuple[int, int], notes: list[str]
) -> dict[str, list[str]]:
    height, width = pixels
    return {"text": [f"{handle.title}: {width} x {height} pixels, {settings.for_model(handle).describe()}", *notes]}
