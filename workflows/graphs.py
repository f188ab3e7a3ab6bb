"""The example workflows themselves."""

from __future__ import annotations

from . import notes
from .layout import Column, Node, Workflow

_TEXT_ENCODER = Node(
    1,
    "CascadeLoadTextEncoder",
    said=True,
    models=(("text_encoders", "text_encoder/model.bf16.safetensors"),),
)
_STAGE_C = Node(
    2,
    "CascadeLoadStageC",
    said=True,
    models=(
        ("diffusion_models", "stage_c_bf16.safetensors"),
        ("diffusion_models", "stage_c_lite_bf16.safetensors"),
    ),
)
_STAGE_B = Node(
    3,
    "CascadeLoadStageB",
    said=True,
    models=(
        ("diffusion_models", "stage_b_bf16.safetensors"),
        ("diffusion_models", "stage_b_lite_bf16.safetensors"),
    ),
)
_STAGE_A = Node(4, "CascadeLoadStageA", said=True, models=(("vae", "stage_a.safetensors"),))
_PREVIEWER = Node(5, "CascadeLoadPreviewer", said=True, models=(("vae_approx", "previewer.safetensors"),))
_LATENT_ENCODER = Node(6, "CascadeLoadLatentEncoder", said=True, models=(("vae", "effnet_encoder.safetensors"),))
_MODELS = Column("Models", (_TEXT_ENCODER, _STAGE_C, _STAGE_B, _STAGE_A, _PREVIEWER), width=250)


def _prompt(id: int, title: str, text: str, encoder: tuple[int, int] = (1, 0)) -> Node:
    return Node(id, "CascadeEncodeText", {"text_encoder": encoder, "text": text}, title, height=140)


def _size(id: int, batch_size: int = 1, stage_c: tuple[int, int] = (2, 0)) -> Node:
    inputs = {"stage_c": stage_c, "batch_size": batch_size}
    return Node(id, "CascadeEmptyLatent", inputs, "Size and number of pictures", said=True)


def _sample_c(id: int, positive: int, negative: int, latent: int, title: str | None = None, **others: object) -> Node:
    links = {"stage_c": (2, 0), "positive": (positive, 0), "negative": (negative, 0), "latent": (latent, 0)}
    return Node(
        id,
        "CascadeSampleStageC",
        {**links, "previewer": (5, 0), **others},
        title,
        height=660,
        said=True,
    )


def _sample_b(id: int, latent: int, positive: int, negative: int, **others: object) -> Node:
    links = {"stage_b": (3, 0), "latent": (latent, 0), "positive": (positive, 0), "negative": (negative, 0)}
    return Node(id, "CascadeSampleStageB", {**links, "stage_a": (4, 0), **others}, height=660, said=True)


def _decode(id: int, latent: int, stage_a: tuple[int, int] = (4, 0)) -> Node:
    return Node(id, "CascadeDecodeStageA", {"stage_a": stage_a, "latent": (latent, 0)})


def _save(
    id: int, images: int, prefix: str = "cascade", title: str | None = None, height: int = 380, output: int = 0
) -> Node:
    return Node(id, "SaveImage", {"images": (images, output), "filename_prefix": prefix}, title, height=height)


TEXT_TO_IMAGE = Workflow(
    "text_to_image",
    notes.TEXT_TO_IMAGE,
    (
        _MODELS,
        Column(
            "Prompt and size",
            (
                _prompt(6, "Prompt", "a large red circle on the left on a blue background"),
                _prompt(7, "Negative prompt", ""),
                _size(8),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (_sample_c(9, 6, 7, 8),), "stage_c"),
        Column("Stage B: detail", (_sample_b(10, 9, 6, 7),), "stage_b"),
        Column("Stage A: the picture", (_decode(11, 10), _save(12, 11)), "stage_a", width=300),
    ),
)

PREVIEW_FIRST = Workflow(
    "preview_first",
    notes.PREVIEW_FIRST,
    (
        Column("Models", (_TEXT_ENCODER, _STAGE_C, _PREVIEWER), width=250),
        Column(
            "Prompt and size",
            (
                _prompt(6, "Prompt", "a red circle on a white background"),
                _prompt(7, "Negative prompt", ""),
                _size(8, batch_size=4),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (_sample_c(9, 6, 7, 8),), "stage_c"),
        Column(
            "Small pictures",
            (
                Node(10, "CascadePreviewLatent", {"previewer": (5, 0), "latent": (9, 0)}),
                _save(11, 10, "cascade_preview"),
            ),
            "stage_c",
            width=300,
        ),
    ),
)

CHECKPOINT_FILES = Workflow(
    "checkpoint_files",
    notes.CHECKPOINT_FILES,
    (
        Column(
            "Models",
            (
                Node(
                    1,
                    "CascadeLoadCheckpoint",
                    said=True,
                    models=(
                        ("checkpoints", "comfyui_checkpoints/stable_cascade_stage_c.safetensors"),
                        ("checkpoints", "comfyui_checkpoints/stable_cascade_stage_b.safetensors"),
                    ),
                ),
            ),
            width=250,
        ),
        Column(
            "Prompt and size",
            (
                _prompt(2, "Prompt", "a large green triangle on the right on a white background", (1, 1)),
                _prompt(3, "Negative prompt", "", (1, 1)),
                _size(4, stage_c=(1, 0)),
            ),
            "text",
        ),
        Column(
            "Stage C: what is seen",
            (_sample_c(5, 2, 3, 4, stage_c=(1, 0), previewer=(1, 4)),),
            "stage_c",
        ),
        Column("Stage B: detail", (_sample_b(6, 5, 2, 3, stage_b=(1, 2), stage_a=(1, 3)),), "stage_b"),
        Column("Stage A: the picture", (_decode(7, 6, (1, 3)), _save(8, 7)), "stage_a", width=300),
    ),
)

CHANGE_THE_PROMPT = Workflow(
    "change_the_prompt",
    notes.CHANGE_THE_PROMPT,
    (
        _MODELS,
        Column(
            "Prompts and size",
            (
                _prompt(6, "Prompt", "a large red circle on the left on a blue background"),
                _prompt(7, "Negative prompt", ""),
                _size(8),
                _prompt(9, "Second prompt", "a large yellow circle on the left on a green background"),
            ),
            "text",
        ),
        Column("Stage C: first picture", (_sample_c(10, 6, 7, 8),), "stage_c"),
        Column("Stage C: changed", (_sample_c(11, 9, 7, 10, "Change it", start=0.8),), "stage_c"),
        Column("Stage B: detail", (_sample_b(12, 11, 9, 7),), "stage_b"),
        Column(
            "Stage A: the picture",
            (
                _decode(15, 12),
                _save(16, 15, "cascade_after", "After"),
                Node(13, "CascadePreviewLatent", {"previewer": (5, 0), "latent": (10, 0)}),
                _save(14, 13, "cascade_before", "Before, as a small picture", height=280),
            ),
            "stage_a",
            width=300,
        ),
    ),
)

TRAIN_LORA = Workflow(
    "train_lora",
    notes.TRAIN_LORA,
    (
        Column("Models", (*_MODELS.nodes, _LATENT_ENCODER), width=250),
        Column(
            "Pictures to learn from",
            (
                _prompt(7, "What they show", "a large yellow circle on the left on a blue background"),
                _prompt(8, "Negative prompt", ""),
                _size(9, batch_size=2),
            ),
            "text",
        ),
        Column("Stage C: the pictures", (_sample_c(10, 7, 8, 9),), "stage_c"),
        Column("Stage B and A: the pictures", (_sample_b(11, 10, 7, 8), _decode(12, 11)), "stage_b"),
        Column(
            "Training",
            (
                Node(
                    13,
                    "CascadeTrainLoRA",
                    {
                        "stage_c": (2, 0),
                        "text_encoder": (1, 0),
                        "latent_encoder": (6, 0),
                        "pictures": (12, 0),
                        "captions": "a large [thing] on the left on a blue background",
                        "name": "thing",
                        "steps": 60,
                        "learning_rate": 0.001,
                        "batch_size": 2,
                        "token": "[thing]",
                        "initial_words": "red circle",
                    },
                    height=760,
                    said=True,
                ),
                _save(25, 13, "cascade_loss", "The error", output=3),
            ),
            "stage_c",
            width=320,
        ),
        Column(
            "Before and after: prompts",
            (
                _prompt(14, "Before: what [thing] began as", "a large red circle on the right on a white background"),
                _prompt(15, "After", "a large [thing] on the right on a white background", (13, 1)),
                _size(16),
            ),
            "text",
        ),
        Column(
            "Stage C: before and after",
            (_sample_c(17, 14, 8, 16, "Before"), _sample_c(18, 15, 8, 16, "After", stage_c=(13, 0))),
            "stage_c",
        ),
        Column("Stage B: before and after", (_sample_b(19, 17, 14, 8), _sample_b(20, 18, 15, 8)), "stage_b"),
        Column(
            "Stage A: before and after",
            (
                _decode(21, 19),
                _save(22, 21, "cascade_before", "Before"),
                _decode(23, 20),
                _save(24, 23, "cascade_after", "After"),
            ),
            "stage_a",
            width=300,
        ),
    ),
)

WORKFLOWS = (TEXT_TO_IMAGE, PREVIEW_FIRST, CHECKPOINT_FILES, CHANGE_THE_PROMPT, TRAIN_LORA)
