"""How well the tiny CLIP towers belong together: captions looking for their pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..cascade_ops.checkpoints import load
from ..cascade_ops.training.clip import retrieval_at_1
from ..cascade_ops.training.loop import read_tensors
from .captions import caption_full
from .drawing import Scene, random_scene, render
from .train_clip import IMAGE_CONFIG, IMAGE_FILE, TEXT_FILE, normalise_pixels

GROUP = 256
SEED = 5_000


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
    text, _ = load(folder / TEXT_FILE, expect="text_encoder", dtype=torch.float32)
    image, _ = load(folder / IMAGE_FILE, expect="image_encoder", dtype=torch.float32)
    projection = read_tensors(folder / IMAGE_FILE)[0]["text_to_image_projection.weight"].float()
    side = (IMAGE_CONFIG["image_size"],) * 2
    texts, images = [], []
    for scene in distinct_scenes(groups * GROUP):
        picture = Image.fromarray(render(scene)).resize(side, Image.Resampling.BICUBIC)
        texts.append(text.encode(caption_full(scene)).pooled)
        images.append(image(normalise_pixels(np.asarray(picture)[None])).image_embeds)
    return retrieval_at_1(torch.cat(images), torch.cat(texts) @ projection.T, GROUP)
