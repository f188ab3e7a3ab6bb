"""What Stages B and C train on, computed once from the pool: latents and token ids."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cascade_ops.models import LatentEncoder, StageA
from ..cascade_ops.models.effnet import normalize_imagenet
from ..cascade_ops.tokenizer import default_tokenizer, pad_tokens
from .drawing import render
from .family import IMAGE_SIZE, as_images, encoder_input
from .pool import CAPTIONS_PER_SCENE, open_pool, pool_scene

_CHUNK = 64


def cached(path: Path, make: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
    """The array in ``path``, memory-mapped; made from the parts that ``make`` yields if it is not there yet."""
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial.npy")
        np.save(partial, np.concatenate(list(make())))
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def stage_c_latents(pool: Path, encoder: LatentEncoder, path: Path, extra: int = 0, seed: int = 1) -> np.ndarray:
    """Stage C latents float16 ``[N + extra, 16, 6, 6]`` of the training pool and of ``extra`` further scenes.

    Further scene ``i`` is ``pool_scene(seed, "train", i)``; it is drawn, encoded and forgotten.
    """

    @torch.inference_mode()
    def make() -> Iterator[np.ndarray]:
        def encode(pictures: np.ndarray) -> np.ndarray:
            return encoder(normalize_imagenet(encoder_input(as_images(pictures)))).half().numpy()

        pictures, _ = open_pool(pool, "train")
        for start in range(0, len(pictures), _CHUNK):
            yield encode(pictures[start : start + _CHUNK])
        for start in range(0, extra, _CHUNK):
            indices = range(start, min(start + _CHUNK, extra))
            yield encode(np.stack([render(pool_scene(seed, "train", i)[0], IMAGE_SIZE) for i in indices]))

    return cached(path, make)


def caption_tokens(pool: Path, path: Path, extra: int = 0, seed: int = 1) -> np.ndarray:
    """Padded token ids int32 ``[N + extra, CAPTIONS_PER_SCENE, 77]``, in the order of ``stage_c_latents``."""
    tokenizer = default_tokenizer()

    def make() -> Iterator[np.ndarray]:
        entries = json.loads((pool / "train.json").read_text(encoding="utf-8"))
        captions = [entry["captions"] for entry in entries]
        captions += [pool_scene(seed, "train", i)[1] for i in range(extra)]
        for texts in captions:
            assert len(texts) == CAPTIONS_PER_SCENE
            yield np.array([[pad_tokens(tokenizer.encode(text))[0] for text in texts]], dtype=np.int32)

    return cached(path, make)


def stage_a_latents(pool: Path, model: StageA, path: Path, count: int) -> np.ndarray:
    """Stage A latents float16 ``[count, 4, 64, 64]`` of the first pictures of the training pool."""

    @torch.inference_mode()
    def make() -> Iterator[np.ndarray]:
        pictures, _ = open_pool(pool, "train")
        for start in range(0, count, _CHUNK):
            yield model.encode(as_images(pictures[start : min(start + _CHUNK, count)]))[0].half().numpy()

    return cached(path, make)


def take(array: np.ndarray, index: Tensor) -> Tensor:
    """Rows of a cached array as a tensor: float32 for floats, int64 for integers."""
    rows = torch.from_numpy(np.ascontiguousarray(array[index.numpy()]))
    return rows.float() if rows.is_floating_point() else rows.long()
