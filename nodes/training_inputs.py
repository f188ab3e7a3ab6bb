"""The inputs that the training nodes share, and what they mean together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from . import runtime

if TYPE_CHECKING:
    from torch import Tensor

STAGE_C = ("CASCADE_STAGE_C", {"tooltip": "The model to train on, which stays as it is, from 'Cascade: load Stage C'."})
TEXT_ENCODER = (
    "CASCADE_TEXT_ENCODER",
    {"tooltip": "Reads the captions, from 'Cascade: load text encoder'."},
)
LATENT_ENCODER = (
    "CASCADE_LATENT_ENCODER",
    {"tooltip": "Turns the pictures into what Stage C makes, from 'Cascade: load latent encoder'."},
)
IMAGE_ENCODER = (
    "CASCADE_IMAGE_ENCODER",
    {"tooltip": "Sees the pictures that the adapter shall follow, from 'Cascade: load image encoder'."},
)


def number(kind: str, default: float, low: float, high: float, tooltip: str, **more: object) -> tuple:
    """An `INT` or `FLOAT` widget."""
    return (kind, {"default": default, "min": low, "max": high, **more, "tooltip": tooltip})


def text(default: str, tooltip: str, **more: object) -> tuple:
    """A `STRING` widget."""
    return ("STRING", {"default": default, **more, "tooltip": tooltip})


def captions_input(example: str) -> tuple:
    return text(
        "",
        f"What the pictures show: one line for all of them, or one line for each, in order. {example} With a folder it "
        "may be empty: then the .txt file beside each picture counts, or metadata.jsonl.",
        multiline=True,
    )


def run_inputs(name: str, steps: int, learning_rate: float, batch_size: int) -> dict[str, tuple]:
    """How a run goes; the same widgets in the same order in every training node."""
    return {
        "name": text(
            name,
            "What the file is called that is written into the models folder; a number is added where that name is "
            "taken.",
        ),
        "steps": number(
            "INT",
            steps,
            1,
            1_000_000,
            "How long to train. Look at the curve, which falls and then stays level, and at pictures: too few steps "
            "change little, too many make every picture look like yours.",
        ),
        "learning_rate": number(
            "FLOAT",
            learning_rate,
            1e-6,
            1.0,
            "How much each step changes. Halve it where the curve rises or pictures break, double it where "
            "nothing happens.",
            step=1e-6,
            round=1e-6,
        ),
        "batch_size": number(
            "INT", batch_size, 1, 1024, "Pictures per step. More make a steadier run and need more memory and time."
        ),
        "seed": number(
            "INT",
            0,
            0,
            2**63 - 1,
            "Decides the noise and the order of the pictures. The same seed and settings give the same weights.",
            control_after_generate=False,
        ),
    }


def source_inputs() -> dict[str, tuple]:
    """Where the pictures come from, and at which size they are learned."""
    return {
        "pictures": (
            "IMAGE",
            {"tooltip": "The pictures to learn from, all of one size. Connect these or name a folder, not both."},
        ),
        "folder": text(
            "",
            "A folder of pictures to learn from, of any sizes: below the input folder, or a whole path. Give this or "
            "connect pictures, not both.",
        ),
        "resolution": number(
            "INT",
            0,
            0,
            8192,
            "Side in pixels of a square picture, other shapes get about its area. 0 is what the model makes (1024 for "
            "the release).",
            step=32,
        ),
    }


RESUME = (
    "BOOLEAN",
    {
        "default": False,
        "tooltip": "Keep the state of the run in output/cascade_training and go on from there the next time: after an "
        "interruption, or with more steps. Off begins anew each time; what an interrupted run has learned is saved in "
        "both cases.",
    },
)


def one_source(pictures: Tensor | None, folder: str) -> str:
    """The folder as a whole path, or an empty string where pictures are connected.

    Raises:
        ValueError: both or none of them, or a folder that is not there.
    """
    folder = folder.strip()
    if pictures is not None and folder:
        raise ValueError(
            f"Pictures are connected and the folder {folder!r} is named, expected one of them: disconnect pictures, or "
            "empty folder."
        )
    if pictures is not None:
        return ""
    if not folder:
        raise ValueError("There are no pictures to learn from: connect pictures, or name a folder.")
    path = in_input_directory(folder)
    if not os.path.isdir(path):
        raise ValueError(f"{path} is no folder, expected one with pictures: name one below the input folder.")
    return path


def in_input_directory(path: str) -> str:
    """A path as a person writes it: below the input folder, or whole."""
    return os.path.join(runtime.input_directory(), os.path.expanduser(path.strip()))


def caption_lines(captions: str) -> list[str]:
    """The lines with something in them."""
    return [line.strip() for line in captions.splitlines() if line.strip()]


def captions_for(lines: list[str], count: int) -> list[str]:
    """One caption for each of `count` pictures; ValueError where there are neither one nor as many lines."""
    if len(lines) not in (1, count):
        found = f"{len(lines)} lines" if lines else "no text"
        wanted = "one line" if count == 1 else f"one line for all {count} pictures or {count}, one for each"
        raise ValueError(f"captions has {found}, expected {wanted}: say what the pictures show.")
    return lines if len(lines) == count else lines * count


def words(value: str) -> tuple[str, ...]:
    """What stands between commas, without what is empty."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def said(lines: list[str], images: list[dict[str, str]]) -> dict[str, Any]:
    """What a node shows after its run."""
    return {"text": lines, "images": images}
