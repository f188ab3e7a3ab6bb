"""LoRAs: a look or a subject on Stage C, and the new words that come with one."""

from __future__ import annotations

from ..layout import Column, Node, Shot, Workflow
from .parts import FILES, MODELS, decode, sample_b, sample_c, save, size
from .parts import prompt as encoded

_ROW = "| a LoRA for your Stage C, of any trainer | loras |\n"
_LORA = 13
_PROMPT, _PICTURE = 6, 12


def _workflow(name: str, note: str, prompt: str, shots: tuple[Shot, ...], **lora: object) -> Workflow:
    """Text to image with a LoRA behind the loaders of Stage C and the text encoder."""
    loader = Node(_LORA, "CascadeLoadLoRA", {"stage_c": (2, 0), "text_encoder": (1, 0), **lora}, said=True)
    encoder = (_LORA, 1)
    return Workflow(
        name,
        note + FILES.replace("| `stage_b", _ROW + "| `stage_b", 1),
        (
            MODELS,
            Column("LoRA", (loader,), "stage_c"),
            Column(
                "Prompt and size",
                (
                    encoded(_PROMPT, "Prompt", prompt, encoder),
                    encoded(7, "Negative prompt", "", encoder),
                    size(8, stage_c=(_LORA, 0)),
                ),
                "text",
            ),
            Column("Stage C: what is seen", (sample_c(9, _PROMPT, 7, 8, stage_c=(_LORA, 0)),), "stage_c"),
            Column("Stage B: detail", (sample_b(10, 9, _PROMPT, 7),), "stage_b"),
            Column("Stage A: the picture", (decode(11, 10), save(_PICTURE, 11)), "stage_a", width=300),
        ),
        shots=shots,
    )


LORA = _workflow(
    "lora",
    """\
# LoRA: a look or a subject

Applies a LoRA to Stage C, and to the text encoder the word that was learned with it: the bundled one is for the tiny
model and teaches a background of four quarters, `[chess]`. **Change first:** put your LoRA into `models/loras`, choose
it as `file` and lower its `strength` where it takes over; for another LoRA put a second *load LoRA* behind this one.

""",
    "a large white circle on the left on a [chess] background",
    tuple(Shot(f"strength {amount:g}", _PICTURE, {_LORA: {"strength": amount}}) for amount in (0.0, 0.5, 1.0)),
)

_SENTENCE = "a large green circle on the right on a {} background"

LORA_NEW_TOKEN = _workflow(
    "lora_new_token",
    """\
# LoRA: a new word

Gives the word that a LoRA learned a name of your own, `[board]`, and asks for it in the prompt; without the word the
LoRA leaves the picture alone. **Change first:** the prompt, with the word in other places or with a weight such as
`([board]:1.2)`; for a file of the original trainer, whose words have no names, also write what the word started as into
`initial_word`.

""",
    _SENTENCE.format("[board]"),
    (
        Shot("a [board] background", _PICTURE),
        *(
            Shot(f"a {colour} background", _PICTURE, {_PROMPT: {"text": _SENTENCE.format(colour)}})
            for colour in ("blue", "white")
        ),
    ),
    token="[board]",
)
