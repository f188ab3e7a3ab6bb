"""From a picture: change it, redraw it, make a part of it anew, make it larger."""

from __future__ import annotations

from ..layout import Column, Node, Shot, Workflow
from .parts import LATENT_ENCODER, MODELS, OWN, TABLE, decode, prompt, sample_b, sample_c, save

_MODELS = Column("Models", (*MODELS.nodes, LATENT_ENCODER), width=250)
_CONTROLNET = Node(
    7,
    "CascadeLoadControlNet",
    {"file": "auto (inpainting)"},
    said=True,
    models=(("controlnet", "controlnet/inpainting.safetensors"),),
)
_ENCODER_ROW = "| `effnet_encoder` | vae |\n"
_CONTROLNET_ROW = "| `controlnet/inpainting` | controlnet |\n"


def _picture(id: int, name: str) -> Node:
    return Node(id, "CascadeExampleImage", {"picture": name}, "Picture (or Load Image)")


def _encode_c(id: int, image: int, mask: tuple[int, int] | None = None) -> Node:
    inputs: dict[str, object] = {"latent_encoder": (6, 0), "image": (image, 0)}
    return Node(id, "CascadeEncodeStageC", inputs | ({"mask": mask} if mask else {}), said=True)


def _read(id: int, encoded: int) -> Node:
    return Node(id, "PreviewImage", {"images": (encoded, 1)}, "The picture in its size", height=280)


_IMAGE_TO_IMAGE_NOTE = f"""\
# Image to image

Makes another picture of the same composition: Stage C starts from the X
{TABLE}{_ENCODER_ROW}{OWN}"""

IMAGE_TO_IMAGE = Workflow(
    "image_to_image",
    _IMAGE_TO_IMAGE_NOTE,
    (
        _MODELS,
        Column("Picture", (_picture(7, "circle"), _encode_c(8, 7), _read(15, 8)), "text"),
        Column(
            "Prompt",
            (
                prompt(9, "What it becomes", "a yellow circle on a green background"),
                prompt(10, "Negative prompt", ""),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(11, 9, 10, 8, start=0.8),), "stage_c"),
        Column("Stage B: detail", (sample_b(12, 11, 9, 10),), "stage_b"),
        Column("Stage A: the picture", (decode(13, 12), save(14, 13)), "stage_a", width=300),
    ),
    shots=(
        Shot("Given", 15),
        Shot("start 0.5", 14, {11: {"start": 0.5}}),
        Shot("start 0.8", 14),
        Shot("start 1: the prompt alone", 14, {11: {"start": 1.0}}),
    ),
)

_RECONSTRUCTION_NOTE = f"""\
# Reconstruction

Takes a picture through the chain without Stage C: the latent encoder makes of it the small latent that Stage C makes
of a prompt, and Stages B and A draw it again from that, which shows how much such a latent holds. **Change first:** put
*Load Image* in place of the picture.

{TABLE}{_ENCODER_ROW}{OWN}"""

RECONSTRUCTION = Workflow(
    "reconstruction",
    _RECONSTRUCTION_NOTE,
    (
        Column("Models", tuple(node for node in _MODELS.nodes if node.id not in (2, 5)), width=250),
        Column("Picture", (_picture(7, "circle"), _encode_c(8, 7), _read(14, 8)), "text"),
        Column("Prompt", (prompt(9, "Prompt", ""), prompt(10, "Negative prompt", "")), "text"),
        Column("Stage B: detail", (sample_b(11, 8, 9, 10),), "stage_b"),
        Column("Stage A: the picture", (decode(12, 11), save(13, 12)), "stage_a", width=300),
    ),
    shots=(
        Shot("Given", 14),
        Shot("Drawn again", 13),
        Shot("Given", 14, {7: {"picture": "cross"}}),
        Shot("Drawn again", 13, {7: {"picture": "cross"}}),
    ),
)


def _painted(before: Column, text: str) -> tuple[Column, ...]:
    """What makes the masked part anew of the picture and the mask that the last node of `before`, 10, gives."""
    control = {"stage_c": (2, 0), "controlnet": (7, 0), "control": (13, 0)}
    start = {"stage_a": (4, 0), "image": (10, 1), "mask": (10, 2)}
    return (
        Column("Models", (*_MODELS.nodes, _CONTROLNET), width=250),
        before,
        Column("Prompt", (prompt(11, "What the picture shows then", text), prompt(12, "Negative prompt", "")), "text"),
        Column(
            "ControlNet",
            (
                Node(13, "CascadeInpaintControl", {"image": (10, 1), "mask": (10, 2)}, said=True),
                Node(14, "PreviewImage", {"images": (13, 1)}, "What the ControlNet reads", height=280),
                Node(15, "CascadeApplyControlNet", control, said=True),
            ),
            "stage_c",
        ),
        Column("Stage C: what is seen", (sample_c(16, 11, 12, 10, stage_c=(15, 0)),), "stage_c"),
        Column(
            "Stage B: detail",
            (
                Node(17, "CascadeEncodeStageA", start, "What Stage B holds", said=True),
                sample_b(18, 16, 11, 12, start_latent=(17, 0)),
            ),
            "stage_b",
        ),
        Column("Stage A: the picture", (decode(19, 18), save(20, 19)), "stage_a", width=300),
    )


_INPAINT_NOTE = f"""\
# Inpainting

Makes the masked part of a picture anew as the prompt says, and keeps the rest: a ControlNet suits what fills the hole
to its surroundings, and both samplers hold what is outside of the mask. **Change first:** put *Load Image* in place of
the picture, paint a mask (right click, *Open in MaskEditor*), and write what the whole picture shows then.

{TABLE}{_ENCODER_ROW}{_CONTROLNET_ROW}{OWN}"""

INPAINT = Workflow(
    "inpaint",
    _INPAINT_NOTE,
    _painted(
        Column(
            "Picture and mask",
            (
                _picture(8, "hole"),
                Node(9, "CascadeFeatherMask", {"mask": (8, 1), "grow": 0, "feather": 16}, said=True),
                _encode_c(10, 8, (9, 0)),
                _read(21, 10),
            ),
            "text",
        ),
        "a large red circle in the centre on a purple background",
    ),
    shots=(Shot("Given", 21), Shot("What the ControlNet reads", 14), Shot("Made anew", 20)),
)

_OUTPAINT_NOTE = f"""\
# Outpainting

Makes a picture larger: a border is added, and made anew to go on with what the picture shows, as in *inpaint*.
**Change first:** put *Load Image* in place of the picture, set how many pixels to add on each side, and write what the
whole picture shows then.

{TABLE}{_ENCODER_ROW}{_CONTROLNET_ROW}{OWN}"""

_WITH_A_SQUARE = "a small white square on the left and a small blue circle on the right on an orange background"

OUTPAINT = Workflow(
    "outpaint",
    _OUTPAINT_NOTE,
    _painted(
        Column(
            "Picture and border",
            (
                _picture(8, "small"),
                Node(
                    9,
                    "CascadePadForOutpainting",
                    {"image": (8, 0), "left": 128, "top": 64, "right": 0, "bottom": 64, "feather": 16},
                    said=True,
                ),
                _encode_c(10, 9, (9, 1)),
                Node(21, "PreviewImage", {"images": (8, 0)}, "The picture as given", height=280),
            ),
            "text",
        ),
        "a small blue circle on the right on an orange background",
    ),
    shots=(
        Shot("Given", 21),
        Shot("What the ControlNet reads", 14),
        Shot("Made larger", 20),
        Shot("With a square in the prompt too", 20, {11: {"text": _WITH_A_SQUARE}}),
    ),
)
