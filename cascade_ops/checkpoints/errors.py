"""The one error of this package and the words that its messages share."""

from __future__ import annotations

from pathlib import Path

STAGE_TITLES = {
    "stage_a": "Stage A",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "latent_encoder": "latent encoder",
    "previewer": "previewer",
    "controlnet": "ControlNet",
    "ip_adapter": "IP-Adapter",
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "combined": "combined checkpoint",
    "lora": "LoRA",
    "embedding": "textual-inversion embedding",
    "unknown": "unknown file",
}

_GENERIC_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip")


class CheckpointError(ValueError):
    """A file is not what was asked for; the message says what was found, what was expected and what to do."""


def shown(path: Path) -> str:
    """The file name; with its folder where the name alone says nothing (``prior/model.safetensors``)."""
    generic = any(path.name == stem or path.name.startswith((stem + ".", stem + "-")) for stem in _GENERIC_STEMS)
    return f"{path.parent.name}/{path.name}" if generic and path.parent.name else path.name
