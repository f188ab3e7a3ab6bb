"""Pictures from text alone."""

from __future__ import annotations

from ..layout import Column, Node, Workflow
from .parts import AUTO, FILES, MODELS, PREVIEWER, STAGE_C, TEXT_ENCODER, decode, prompt, sample_b, sample_c, save, size

_TEXT_TO_IMAGE_NOTE = f"""\
# Text to image with Stable Cascade

Write a prompt and press **Run**. Stage C decides what is seen, Stage B adds detail, Stage A makes the picture.

{FILES}"""

TEXT_TO_IMAGE = Workflow(
    "text_to_image",
    _TEXT_TO_IMAGE_NOTE,
    (
        MODELS,
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a large red circle on the left on a blue background"),
                prompt(7, "Negative prompt", ""),
                size(8),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(9, 6, 7, 8),), "stage_c"),
        Column("Stage B: detail", (sample_b(10, 9, 6, 7),), "stage_b"),
        Column("Stage A: the picture", (decode(11, 10), save(12, 11)), "stage_a", width=300),
    ),
)

_PREVIEW_FIRST_NOTE = f"""\
# Choose a seed first

Makes four small pictures with Stage C alone, in a fraction of the time: Stage B and Stage A change no more what is
seen. The first has the seed of the sampler, the next that seed + 1 and so on. Put the seed of the one you like into
*text_to_image*, with the same prompt.

{AUTO}
| file | below `models/` |
|---|---|
| `stage_c_bf16` or `stage_c_lite_bf16` | diffusion_models |
| `text_encoder/model.bf16` | text_encoders |
| `previewer` | vae_approx |
"""

PREVIEW_FIRST = Workflow(
    "preview_first",
    _PREVIEW_FIRST_NOTE,
    (
        Column("Models", (TEXT_ENCODER, STAGE_C, PREVIEWER), width=250),
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a red circle on a white background"),
                prompt(7, "Negative prompt", ""),
                size(8, batch_size=4),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(9, 6, 7, 8),), "stage_c"),
        Column(
            "Small pictures",
            (
                Node(10, "CascadePreviewLatent", {"previewer": (5, 0), "latent": (9, 0)}),
                save(11, 10, "cascade_preview"),
            ),
            "stage_c",
            width=300,
        ),
    ),
)

_CHECKPOINT_FILES_NOTE = f"""\
# Text to image from the two combined files

As *text_to_image*, with one loader for everything.

{AUTO}
| file in `comfyui_checkpoints` | below `models/` |
|---|---|
| `stable_cascade_stage_c` (Stage C, text encoder, previewer) | checkpoints |
| `stable_cascade_stage_b` (Stage B, Stage A) | checkpoints |
"""

CHECKPOINT_FILES = Workflow(
    "checkpoint_files",
    _CHECKPOINT_FILES_NOTE,
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
                prompt(2, "Prompt", "a large green triangle on the right on a white background", (1, 1)),
                prompt(3, "Negative prompt", "", (1, 1)),
                size(4, stage_c=(1, 0)),
            ),
            "text",
        ),
        Column(
            "Stage C: what is seen",
            (sample_c(5, 2, 3, 4, stage_c=(1, 0), previewer=(1, 4)),),
            "stage_c",
        ),
        Column("Stage B: detail", (sample_b(6, 5, 2, 3, stage_b=(1, 2), stage_a=(1, 3)),), "stage_b"),
        Column("Stage A: the picture", (decode(7, 6, (1, 3)), save(8, 7)), "stage_a", width=300),
    ),
)

_CHANGE_THE_PROMPT_NOTE = f"""\
# Change the prompt of a picture

Makes a picture and from it another one that keeps its composition: *Change it* has another prompt, and starts from the
latent of the first picture instead of noise. The higher its `start`, the more may change.

{FILES}"""

CHANGE_THE_PROMPT = Workflow(
    "change_the_prompt",
    _CHANGE_THE_PROMPT_NOTE,
    (
        MODELS,
        Column(
            "Prompts and size",
            (
                prompt(6, "Prompt", "a large red circle on the left on a blue background"),
                prompt(7, "Negative prompt", ""),
                size(8),
                prompt(9, "Second prompt", "a large yellow circle on the left on a green background"),
            ),
            "text",
        ),
        Column("Stage C: first picture", (sample_c(10, 6, 7, 8),), "stage_c"),
        Column("Stage C: changed", (sample_c(11, 9, 7, 10, "Change it", start=0.8),), "stage_c"),
        Column("Stage B: detail", (sample_b(12, 11, 9, 7),), "stage_b"),
        Column(
            "Stage A: the picture",
            (
                decode(15, 12),
                save(16, 15, "cascade_after", "After"),
                Node(13, "CascadePreviewLatent", {"previewer": (5, 0), "latent": (10, 0)}),
                save(14, 13, "cascade_before", "Before, as a small picture", height=280),
            ),
            "stage_a",
            width=300,
        ),
    ),
)
