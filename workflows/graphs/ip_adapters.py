"""A picture beside the prompt through an IP-Adapter, two pictures in different blocks, and everything at once."""

from __future__ import annotations

from dataclasses import replace

from ..layout import Column, Node, Shot, Workflow
from .parts import IMAGE_ENCODER, IMAGE_ENCODER_ROW, MODELS, OWN, TABLE, decode, prompt, sample_b, sample_c, save, size

_FILES = f"""\
{TABLE}{IMAGE_ENCODER_ROW}| an IP-Adapter for your Stage C | controlnet |

There is no public IP-Adapter for Stable Cascade: *train IP-Adapter* makes one.
{OWN}"""

_IMAGE_ENCODER = replace(IMAGE_ENCODER, id=6)
_IP_ADAPTER = Node(7, "CascadeLoadIPAdapter", said=True)
_MODELS = Column("Models", (*MODELS.nodes, _IMAGE_ENCODER, _IP_ADAPTER), width=250)


def _picture(id: int, name: str, title: str = "Picture (or Load Image)") -> Node:
    return Node(id, "CascadeExampleImage", {"picture": name}, title)


def _read(id: int, image: int, stage_c: tuple[int, int] = (2, 0), title: str | None = None, **others: object) -> Node:
    links = {"stage_c": stage_c, "ip_adapter": (7, 0), "image_encoder": (6, 0), "image": (image, 0)}
    return Node(id, "CascadeApplyIPAdapter", {**links, **others}, title, said=True)


_IP_ADAPTER_NOTE = f"""\
# A picture beside the prompt

An IP-Adapter reads a picture and fills in what the prompt leaves open: here the prompt says what stands where, and the
picture gives the background. **Change first:** put *Load Image* in place of the picture, write what the new one shows,
then move `weight`: lower leaves more to the prompt.

{_FILES}"""

IP_ADAPTER = Workflow(
    "ip_adapter",
    _IP_ADAPTER_NOTE,
    (
        _MODELS,
        Column("Picture", (_picture(8, "triangle"), _read(9, 8)), "text"),
        Column(
            "Prompt and size",
            (prompt(10, "Prompt", "a large red circle on the right"), prompt(11, "Negative prompt", ""), size(12)),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(13, 10, 11, 12, stage_c=(9, 0)),), "stage_c"),
        Column("Stage B: detail", (sample_b(14, 13, 10, 11),), "stage_b"),
        Column("Stage A: the picture", (decode(15, 14), save(16, 15)), "stage_a", width=300),
    ),
    shots=(
        Shot("Given", 8),
        Shot("The prompt alone (weight 0)", 16, {9: {"weight": 0.0}}),
        Shot("With the picture", 16),
    ),
)

_STYLE_AND_LAYOUT_NOTE = f"""\
# Style of one picture, layout of another

Each picture is read in other attention blocks: the first, in the outer blocks on the way down, gives what fills the
frame, and the second, in the rest, the look of what is in it. **Change first:** put *Load Image* in place of both
pictures, then move the four weights of the groups of blocks at each: which group takes what depends on the adapter.

{_FILES}"""

IP_ADAPTER_STYLE_AND_LAYOUT = Workflow(
    "ip_adapter_style_and_layout",
    _STYLE_AND_LAYOUT_NOTE,
    (
        _MODELS,
        Column(
            "Layout",
            (
                _picture(8, "triangle", "Layout (or Load Image)"),
                _read(9, 8, title="Read the layout", weight=0.4, down_inner=0.0, up_inner=0.0, up_outer=0.0),
            ),
            "text",
        ),
        Column(
            "Style",
            (
                _picture(10, "cross", "Style (or Load Image)"),
                _read(11, 10, (9, 0), "Read the style", down_outer=0.0),
            ),
            "text",
        ),
        Column(
            "Prompt and size",
            (prompt(12, "Prompt", ""), prompt(13, "Negative prompt", ""), size(14)),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(15, 12, 13, 14, stage_c=(11, 0)),), "stage_c"),
        Column("Stage B: detail", (sample_b(16, 15, 12, 13),), "stage_b"),
        Column("Stage A: the picture", (decode(17, 16), save(18, 17)), "stage_a", width=300),
    ),
    shots=(
        Shot("Layout", 8),
        Shot("Style", 10),
        Shot("Both", 18),
        Shot("Layout alone", 18, {11: {"weight": 0.0}}),
        Shot("Style alone", 18, {9: {"weight": 0.0}}),
        Shot("Neither", 18, {9: {"weight": 0.0}, 11: {"weight": 0.0}}),
    ),
)

_COMBINED_NOTE = f"""\
# LoRA, ControlNet and IP-Adapter together

Each decides a part: the LoRA's word `[chess]` the background, the edges of a picture the outline of what stands there,
and a second picture, read inside of the mask alone, its colour. **Change first:** put *Load Image* in place of both
pictures (the first with a mask: right click, *Open in MaskEditor*), choose your LoRA and write its word in the prompt.

The order of the three does not matter. A weight or strength of 0 leaves one out.

{_FILES}"""

COMBINED = Workflow(
    "combined",
    _COMBINED_NOTE,
    (
        Column(
            "Models",
            (
                *_MODELS.nodes,
                Node(
                    8,
                    "CascadeLoadControlNet",
                    {"file": "auto (canny)"},
                    said=True,
                    models=(("controlnet", "controlnet/canny.safetensors"),),
                ),
            ),
            width=250,
        ),
        Column(
            "LoRA",
            (
                Node(9, "CascadeLoadLoRA", {"stage_c": (2, 0), "text_encoder": (1, 0)}, said=True),
                prompt(10, "Prompt with the LoRA's word", "a square on a [chess] background", (9, 1)),
                prompt(11, "Negative prompt", "", (9, 1)),
                size(12),
            ),
            "text",
        ),
        Column(
            "ControlNet",
            (
                _picture(13, "hole", "Outline and mask (or Load Image)"),
                Node(14, "CascadeCannyControl", {"image": (13, 0)}, said=True),
                Node(15, "PreviewImage", {"images": (14, 1)}, "Edges", height=220),
                Node(
                    16,
                    "CascadeApplyControlNet",
                    {"stage_c": (9, 0), "controlnet": (8, 0), "control": (14, 0)},
                    said=True,
                ),
            ),
            "text",
            width=280,
        ),
        Column(
            "IP-Adapter",
            (
                _picture(17, "cross", "Look (or Load Image)"),
                _read(18, 17, (16, 0), mask=(13, 1)),
            ),
            "text",
            width=280,
        ),
        Column("Stage C: what is seen", (sample_c(19, 10, 11, 12, stage_c=(18, 0), seed=3),), "stage_c"),
        Column("Stage B: detail", (sample_b(20, 19, 10, 11, seed=3),), "stage_b"),
        Column("Stage A: the picture", (decode(21, 20), save(22, 21)), "stage_a", width=300),
    ),
    shots=(
        Shot("Outline and mask", 13),
        Shot("Look", 17),
        Shot("All three", 22),
        Shot("Without the LoRA", 22, {9: {"strength": 0.0, "text_strength": 0.0}}),
        Shot("Without the ControlNet", 22, {16: {"strength": 0.0}}),
        Shot("Without the IP-Adapter", 22, {18: {"weight": 0.0}}),
    ),
)
