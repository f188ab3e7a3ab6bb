"""Pictures as prompts."""

from __future__ import annotations

from ..layout import Column, Node, Shot, Workflow
from .parts import IMAGE_ENCODER, IMAGE_ENCODER_ROW, MODELS, OWN, TABLE, decode, prompt, sample_b, sample_c, save, size

_WORDS = "a small green circle at the top left"

_NOTE = f"""\
# Image variation

Makes a new picture of what another one shows: Stage C reads it as a prompt (CLIP), with what is in it and how it looks,
and hardly where. Words may be added: they say what they say, and the picture fills in the rest. **Change first:** put
*Load Image* in place of the picture; then write a prompt, such as *a small green circle at the top left*.

{TABLE}{IMAGE_ENCODER_ROW}{OWN}
To keep the composition of a picture as well, take *image_to_image*.
"""

IMAGE_VARIATION = Workflow(
    "image_variation",
    _NOTE,
    (
        Column("Models", (*MODELS.nodes, IMAGE_ENCODER), width=250),
        Column(
            "Prompt and picture",
            (
                prompt(8, "Words (may be empty)", ""),
                prompt(9, "Negative prompt", ""),
                Node(10, "CascadeExampleImage", {"picture": "circle"}, "Picture (or Load Image)"),
                Node(
                    11,
                    "CascadeImagePrompt",
                    {"conditioning": (8, 0), "image_encoder": (7, 0), "image": (10, 0)},
                    "The picture as a prompt",
                    said=True,
                ),
                size(12),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(13, 11, 9, 12),), "stage_c"),
        Column("Stage B: detail", (sample_b(14, 13, 11, 9),), "stage_b"),
        Column(
            "Stage A: the picture",
            (
                decode(15, 14),
                save(16, 15),
                Node(17, "PreviewImage", {"images": (10, 0)}, "The picture that was given", height=280),
            ),
            "stage_a",
            width=300,
        ),
    ),
    note_size=(280, 680),
    shots=(
        Shot("Given", 17),
        Shot("Variation: no words", 16),
        Shot("Words alone: a small green circle at the top left", 16, {8: {"text": _WORDS}, 11: {"weight": 0.0}}),
        Shot("The same words and the picture", 16, {8: {"text": _WORDS}}),
    ),
)
