"""How well the tiny CLIP towers belong together: captions looking for their pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ..cascade_ops.checkpoints import load
from ..cascade_ops.training.clip import retrieval_at_1
from ..cascade_ops.vision import clip_pixels
from .captions import caption_full
from .drawing import Scene, random_scene, render
from .family import as_images

GROUP = 256
SEED = 5_000
PROJECTION = "text_to_image_projection.weight"


def distinct_scenes(count: int) -> list[Scene]:
    """Test scenes with different canonical captions: no caption could choose between two pictures that share it."""
    rng = np.random.default_rng(SEED)
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = random_scene(rng, "test")
        scenes.setdefault(caption_full(scene), scene)
    return list(scenes.values())


@torch.inference_mode()
def retrieval(folder: Path, groups: int = 4) -> float:
    """Retrieval@1: the share of captions whose own picture is the nearest of 256, over some groups of 256 test scenes.

    Args:
        folder: holds ``text_encoder.safetensors`` and ``image_encoder.safetensors``.
    """
    text, _ = load(folder / "text_encoder.safetensors", expect="text_encoder", dtype=torch.float32)
    path = folder / "image_encoder.safetensors"
    image, _ = load(path, expect="image_encoder", dtype=torch.float32)
    with safe_open(str(path), "pt") as file:
        projection = file.get_tensor(PROJECTION).float()
    texts, images = [], []
    for scene in distinct_scenes(groups * GROUP):
        texts.append(text.encode(caption_full(scene)).pooled)
        pixels = clip_pixels(as_images(render(scene)[None]), image.config.image_size)
        images.append(image(pixels).image_embeds)
    return retrieval_at_1(torch.cat(images), torch.cat(texts) @ projection.T, GROUP)
