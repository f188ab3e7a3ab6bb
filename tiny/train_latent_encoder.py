"""Train the tiny latent encoder and previewer.

python -m stable_cascade_nodes.tiny.train_latent_encoder --out DIR
"""

import os
from pathlib import Path

import numpy as np
import torch

from ..cascade_ops.models import LatentEncoder, Previewer
from ..cascade_ops.training.latent_encoder import LatentBatch, LatentEncoderObjective, refit_latent_norm
from ..cascade_ops.training.loop import LoopConfig, Trainer
from .drawing import COLOURS, SHAPES, Scene, signed_distance
from .family import ENCODE_SIZE, LATENT_ENCODER, PREVIEWER, STAGE_C_SIZE, as_images, encoder_input
from .pool import open_pool
from .publish import save_part
from .recipe import log, parse

BATCH = 24
LARGEST_NOISE = 0.4
FROZEN_FROM = 0.6
MAP_SIZE = ENCODE_SIZE // 4
CLASSES = [1 + len(SHAPES), 1 + len(COLOURS)]


def encoder_inputs(pool: Path, split: str, count: int | None = None) -> np.ndarray:
    """The pool's pictures at the encoder's size, uint8 ``[N, 192, 192, 3]``; made once, then memory-mapped."""
    path = pool / f"{split}_{ENCODE_SIZE}.npy"
    if not path.exists():
        pictures, _ = open_pool(pool, split)
        partial = path.with_suffix(".npy.partial")
        shape = (len(pictures), ENCODE_SIZE, ENCODE_SIZE, 3)
        small = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, len(pictures), 64):
            images = encoder_input(as_images(pictures[start : start + 64]))
            small[start : start + 64] = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        small.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")[:count]


def label_map(scene: Scene) -> np.ndarray:
    """Which shape and which colour covers each point of a grid: uint8 ``[2, MAP_SIZE, MAP_SIZE]``, 0 background."""
    labels = np.zeros((2, MAP_SIZE, MAP_SIZE), dtype=np.uint8)
    axis = (np.arange(MAP_SIZE) + 0.5) / MAP_SIZE
    for item in scene.objects:
        x, y = (axis[None, :] - item.x) / item.radius, (axis[:, None] - item.y) / item.radius
        inside = signed_distance(item.shape, x, y) < 0
        labels[0][inside] = 1 + SHAPES.index(item.shape)
        labels[1][inside] = 1 + list(COLOURS).index(item.colour)
    return labels


def label_maps(pool: Path, split: str) -> np.ndarray:
    """The label maps of a whole pool, ``[N, 2, MAP_SIZE, MAP_SIZE]``; made once."""
    path = pool / f"{split}_labels.npy"
    if not path.exists():
        _, entries = open_pool(pool, split)
        maps = np.stack([label_map(Scene.from_dict(entry["scene"])) for entry in entries])
        partial = path.with_suffix(".partial.npy")
        np.save(partial, maps)
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def main(arguments: list[str] | None = None) -> None:
    given = parse("Train the tiny latent encoder and previewer.", 3000, arguments)
    pictures, labels = encoder_inputs(given.pool, "train"), label_maps(given.pool, "train")
    torch.manual_seed(0)
    encoder, previewer = LatentEncoder(**LATENT_ENCODER), Previewer(**PREVIEWER)
    objective = LatentEncoderObjective(encoder, previewer, CLASSES)
    objective = objective.to(given.device, memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator):
        objective.freeze_norms(step >= FROZEN_FROM * given.steps)
        index = torch.randint(len(pictures), (BATCH,), generator=generator).sort().values.numpy()
        level = torch.rand(BATCH, 1, 1, 1, generator=generator) * LARGEST_NOISE
        noise = torch.randn(BATCH, 16, STAGE_C_SIZE, STAGE_C_SIZE, generator=generator) * level
        parts = as_images(pictures[index]), torch.from_numpy(labels[index]).long(), noise
        return objective.loss(LatentBatch(*(part.to(given.device) for part in parts)))

    config = LoopConfig(given.steps, lr=2e-3, ema_decay=0.998, save_every=500)
    trainer = Trainer(objective, loss, config, given.out / "latent_encoder.run.safetensors")
    trainer.run(log=log)
    with trainer.averaged():
        objective.cpu().eval()
        refit_latent_norm(encoder, as_images(pictures[:2048]))
        save_part(encoder, given.out / "latent_encoder.safetensors", "latent_encoder", LATENT_ENCODER)
        save_part(previewer, given.out / "previewer.safetensors", "previewer", PREVIEWER)


if __name__ == "__main__":
    main()
