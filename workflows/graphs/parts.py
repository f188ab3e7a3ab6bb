"""What the example workflows share: loaders, the usual nodes of the chain, and what the notes say of files."""

from __future__ import annotations

from ..layout import Column, Node

AUTO = """\
`auto` takes the best file it finds, and without any the tiny model that comes with these nodes (it knows coloured
shapes only). For the real thing put files of
[stabilityai/stable-cascade](https://huggingface.co/stabilityai/stable-cascade) here and press **R**:
"""

TABLE = f"""\
{AUTO}
| file | below `models/` |
|---|---|
| `stage_c_bf16` or `stage_c_lite_bf16` | diffusion_models |
| `stage_b_bf16` or `stage_b_lite_bf16` | diffusion_models |
| `stage_a` | vae |
| `text_encoder/model.bf16` | text_encoders |
| `previewer` | vae_approx |
"""
OWN = """
`0` in width, height, guidance and shift is the model's own value. Each node shows what it took after a run.
"""

FILES = TABLE + OWN

TEXT_ENCODER = Node(
    1,
    "CascadeLoadTextEncoder",
    said=True,
    models=(("text_encoders", "text_encoder/model.bf16.safetensors"),),
)
STAGE_C = Node(
    2,
    "CascadeLoadStageC",
    said=True,
    models=(
        ("diffusion_models", "stage_c_bf16.safetensors"),
        ("diffusion_models", "stage_c_lite_bf16.safetensors"),
    ),
)
STAGE_B = Node(
    3,
    "CascadeLoadStageB",
    said=True,
    models=(
        ("diffusion_models", "stage_b_bf16.safetensors"),
        ("diffusion_models", "stage_b_lite_bf16.safetensors"),
    ),
)
STAGE_A = Node(4, "CascadeLoadStageA", said=True, models=(("vae", "stage_a.safetensors"),))
PREVIEWER = Node(5, "CascadeLoadPreviewer", said=True, models=(("vae_approx", "previewer.safetensors"),))
LATENT_ENCODER = Node(6, "CascadeLoadLatentEncoder", said=True, models=(("vae", "effnet_encoder.safetensors"),))
MODELS = Column("Models", (TEXT_ENCODER, STAGE_C, STAGE_B, STAGE_A, PREVIEWER), width=250)


def prompt(id: int, title: str, text: str, encoder: tuple[int, int] = (1, 0)) -> Node:
    return Node(id, "CascadeEncodeText", {"text_encoder": encoder, "text": text}, title, height=140)


def size(id: int, batch_size: int = 1, stage_c: tuple[int, int] = (2, 0)) -> Node:
    inputs = {"stage_c": stage_c, "batch_size": batch_size}
    return Node(id, "CascadeEmptyLatent", inputs, "Size and number of pictures", said=True)


def sample_c(id: int, positive: int, negative: int, latent: int, title: str | None = None, **others: object) -> Node:
    links = {"stage_c": (2, 0), "positive": (positive, 0), "negative": (negative, 0), "latent": (latent, 0)}
    return Node(
        id,
        "CascadeSampleStageC",
        {**links, "previewer": (5, 0), **others},
        title,
        height=690,
        said=True,
    )


def sample_b(id: int, latent: int, positive: int, negative: int, **others: object) -> Node:
    links = {"stage_b": (3, 0), "latent": (latent, 0), "positive": (positive, 0), "negative": (negative, 0)}
    return Node(id, "CascadeSampleStageB", {**links, "stage_a": (4, 0), **others}, height=740, said=True)


def decode(id: int, latent: int, stage_a: tuple[int, int] = (4, 0)) -> Node:
    return Node(id, "CascadeDecodeStageA", {"stage_a": stage_a, "latent": (latent, 0)})


def save(
    id: int, images: int, prefix: str = "cascade", title: str | None = None, height: int = 380, output: int = 0
) -> Node:
    return Node(id, "SaveImage", {"images": (images, output), "filename_prefix": prefix}, title, height=height)


# In another repository than the rest.
_PRIOR = "https://huggingface.co/stabilityai/stable-cascade-prior"
IMAGE_ENCODER = Node(
    7,
    "CascadeLoadImageEncoder",
    said=True,
    models=(("clip_vision", f"{_PRIOR}/resolve/main/image_encoder/model.safetensors"),),
)
IMAGE_ENCODER_ROW = f"""\
| `image_encoder/model` of [the prior]({_PRIOR}) | clip_vision |
"""
