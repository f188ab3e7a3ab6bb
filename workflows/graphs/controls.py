"""What a ControlNet follows: the outlines of a picture, a smaller picture, faces."""

from __future__ import annotations

from ..layout import Column, Node, Shot, Workflow
from .parts import LATENT_ENCODER, MODELS, OWN, TABLE, decode, prompt, sample_b, sample_c, save, size


def _controlnet(kind: str, *files: str) -> Node:
    models = tuple(("controlnet", f"controlnet/{file}.safetensors") for file in files)
    return Node(7, "CascadeLoadControlNet", {"file": f"auto ({kind})"}, said=True, models=models)


def _picture(id: int, name: str) -> Node:
    return Node(id, "CascadeExampleImage", {"picture": name}, "Picture (or Load Image)")


def _shown(id: int, made: int, title: str) -> Node:
    return Node(id, "PreviewImage", {"images": (made, 1)}, title, height=280)


def _apply(id: int, control: int) -> Node:
    links = {"stage_c": (2, 0), "controlnet": (7, 0), "control": (control, 0)}
    return Node(id, "CascadeApplyControlNet", links, said=True)


def _prompts(text: str, *more: Node) -> Column:
    return Column("Prompt and size", (prompt(20, "Prompt", text), prompt(21, "Negative prompt", ""), *more), "text")


def _sampled(applied: int, **settings: object) -> tuple[Column, ...]:
    """The chain after the ControlNet: prompts 20 and 21, size 22, saved by 26."""
    return (
        Column("Stage C: what is seen", (sample_c(23, 20, 21, 22, stage_c=(applied, 0), **settings),), "stage_c"),
        Column("Stage B: detail", (sample_b(24, 23, 20, 21),), "stage_b"),
        Column("Stage A: the picture", (decode(25, 24), save(26, 25)), "stage_a", width=300),
    )


_CANNY_NOTE = f"""\
# Canny: the same outlines

Finds the edges of a picture and makes another one with the same outlines: the prompt says what they are of, and in
which colours. **Change first:** put *Load Image* in place of the picture, write what the new one shows, and give *Size*
a width and height of the picture's shape; then lower `strength`, or raise `end`, where the outlines hold too much.

{TABLE}| `controlnet/canny` | controlnet |
{OWN}"""

CANNY = Workflow(
    "canny",
    _CANNY_NOTE,
    (
        Column("Models", (*MODELS.nodes, _controlnet("canny", "canny")), width=250),
        Column(
            "Outlines",
            (
                _picture(10, "circle"),
                Node(11, "CascadeCannyControl", {"image": (10, 0)}, said=True),
                _shown(12, 11, "Its edges"),
                _apply(13, 11),
            ),
            "stage_c",
        ),
        _prompts("a yellow circle on a green background", size(22)),
        *_sampled(13),
    ),
    shots=(
        Shot("Given", 10),
        Shot("Its edges", 12),
        Shot("The prompt alone (strength 0)", 26, {13: {"strength": 0.0}}),
        Shot("With the edges", 26),
    ),
)

_SUPER_RESOLUTION_NOTE = f"""\
# Super-resolution: the same picture, larger

Encodes a small picture and makes one of twice its size in both directions, whose detail is new: the release makes 2048
x 2048 of 1024 x 1024, with guidance 1. **Change first:** put *Load Image* in place of the picture and write what it
shows. The tiny ControlNet keeps what is where and loses outlines: enlarging its flat drawings by calculation is better.

{TABLE}| `effnet_encoder` | vae |
| `controlnet/super_resolution` | controlnet |
{OWN}"""

SUPER_RESOLUTION = Workflow(
    "super_resolution",
    _SUPER_RESOLUTION_NOTE,
    (
        Column(
            "Models",
            (*MODELS.nodes, LATENT_ENCODER, _controlnet("super_resolution", "super_resolution")),
            width=250,
        ),
        Column(
            "Small picture",
            (
                _picture(10, "small"),
                Node(
                    11,
                    "CascadeSuperResolutionControl",
                    {"latent_encoder": (6, 0), "image": (10, 0), "previewer": (5, 0)},
                    said=True,
                ),
                _shown(12, 11, "What its encoding has kept"),
                _apply(13, 11),
            ),
            "stage_c",
            width=280,
        ),
        _prompts(
            "a circle on an orange background",
            Node(
                22,
                "CascadeEmptyLatent",
                {"stage_c": (2, 0), "width": (11, 2), "height": (11, 3)},
                "Twice the size",
                said=True,
            ),
        ),
        *_sampled(13, guidance=1.0, seed=2),
    ),
    shots=(
        Shot("Given", 10),
        Shot("The prompt alone (strength 0)", 26, {13: {"strength": 0.0}}),
        Shot("With the small picture", 26),
    ),
)

_FACE_IDENTITY_NOTE = f"""\
# Face identity: the same person

Puts known faces where they are in a picture; the prompt says the rest. The tiny ControlNet knows coloured shapes
instead of faces, by vectors that come with the example pictures. **Change first:** with an identity ControlNet for your
Stage C, put *Cascade: detect faces* with a photo in place of *load faces*.

{TABLE}| an identity ControlNet | controlnet |
| InsightFace's `buffalo_l` (for *detect faces*) | insightface/models |

No identity ControlNet for Stable Cascade was ever published: *train ControlNet* makes one.
{OWN}"""

FACE_IDENTITY = Workflow(
    "face_identity",
    _FACE_IDENTITY_NOTE,
    (
        Column("Models", (*MODELS.nodes, _controlnet("identity")), width=250),
        Column(
            "Faces",
            (
                Node(10, "CascadeLoadFaces", {"picture": "circle"}, said=True),
                Node(11, "CascadeFaceIdentityControl", {"faces": (10, 0)}, said=True),
                _shown(12, 11, "Whose face is where"),
                _apply(13, 11),
            ),
            "stage_c",
        ),
        _prompts("a yellow background", size(22)),
        *_sampled(13),
    ),
    shots=(
        Shot("Whose face is where", 12),
        Shot("The prompt alone (strength 0)", 26, {13: {"strength": 0.0}}),
        Shot("With the face", 26),
    ),
)
