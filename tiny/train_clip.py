"""Train the tiny family's CLIP towers from nothing.

    python -m stable_cascade_nodes.tiny.train_clip text --out DIR
    python -m stable_cascade_nodes.tiny.train_clip image --out DIR --pool POOL

`text` needs no pictures: it learns from scenes and the captions of them. `image` learns from the pool against the
finished text encoder. Both write `DIR/<name>.safetensors` (float32) and go on from `DIR/<name>.run.safetensors`
when they are interrupted.

The vocabulary of the text encoder is CLIP's own; the file holds only the rows of the tokens that captions use, with
their ids in the tensor `token_rows`. The image encoder's file also holds `text_to_image_projection.weight`, the
matrix that takes text embeddings into the space of image embeddings: the widths differ on purpose, as in the release.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cascade_ops.training.clip import (
    ImageObjective,
    Targets,
    TextObjective,
    mean_state,
)
from ..cascade_ops.training.loop import LoopConfig, Trainer, read_tensors, write_tensors
from .captions import Description, caption, caption_full, describe
from .drawing import COLOURS, PATTERNS, POSITION_NAMES, SHAPES, SIZES, Scene, SceneObject, random_scene
from .pool import open_pool
from .recipe import default_device, log

TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
IMAGE_CONFIG = {
    "image_size": 224,
    "patch_size": 28,
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
}
# CLIP's own normalisation (Radford et al. 2021, published preprocessing).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

TEXT_STEPS, TEXT_BATCH = 2400, 64
IMAGE_STEPS, IMAGE_BATCH = 1600, 128
TEXT_FILE, IMAGE_FILE = "text_encoder.safetensors", "image_encoder.safetensors"
_UNNAMED = "unnamed"
_NONE = "none"

_CLASSES: dict[str, tuple[str, ...]] = {
    "background": (*COLOURS, _UNNAMED),
    "pattern": (*PATTERNS, _UNNAMED),
    "second": (*COLOURS, _NONE, _UNNAMED),
}
for _slot in ("first", "other"):
    _CLASSES |= {
        f"{_slot} colour": (*COLOURS, _NONE),
        f"{_slot} shape": (*SHAPES, _NONE),
        f"{_slot} size": (*SIZES, _NONE, _UNNAMED),
        f"{_slot} position": (*POSITION_NAMES, _NONE, _UNNAMED),
    }
CLASS_COUNTS = {name: len(values) for name, values in _CLASSES.items()}


def attributes(description: Description, scene: Scene, *, ordered: bool) -> dict[str, int]:
    """The class index of every attribute of a caption.

    `ordered` keeps the order of mention. Otherwise the first object is the one that comes first in reading order,
    which two captions of one picture agree on; without named positions the order of mention is all there is.
    """
    objects = list(description.objects)
    if not ordered and description.names_positions:
        objects.sort(key=lambda item: POSITION_NAMES.index(item.position))
    names = {
        "background": scene.background if description.names_background else _UNNAMED,
        "pattern": scene.pattern if description.names_background else _UNNAMED,
        "second": (scene.second or _NONE) if description.names_background else _UNNAMED,
    }
    for index, slot in enumerate(("first", "other")):
        item: SceneObject | None = objects[index] if index < len(objects) else None
        names[f"{slot} colour"] = item.colour if item else _NONE
        names[f"{slot} shape"] = item.shape if item else _NONE
        names[f"{slot} size"] = (item.size if description.names_sizes else _UNNAMED) if item else _NONE
        names[f"{slot} position"] = (item.position if description.names_positions else _UNNAMED) if item else _NONE
    return {name: _CLASSES[name].index(value) for name, value in names.items()}


def stack_targets(rows: Iterable[dict[str, int]]) -> Targets:
    """A dict of class indices per sample -> a dict of tensors [B]."""
    rows = list(rows)
    return {name: torch.tensor([row[name] for row in rows]) for name in _CLASSES}


def full_description(scene: Scene) -> Description:
    """The canonical caption, which names everything."""
    return Description(caption_full(scene), scene.objects)


@lru_cache(maxsize=1)
def _tokenizer() -> Callable[[str], list[int]]:
    from ..cascade_ops.tokenizer import default_tokenizer

    return default_tokenizer().encode


class CompactVocabulary:
    """The tokens that captions use, as consecutive rows 0..n-1 in the order of their CLIP ids.

    `ids` is int64 [n], ascending; the last two are CLIP's start and end tokens, so the end keeps the highest number.
    """

    def __init__(self, ids: Iterable[int]):
        self.ids = sorted({*ids, TEXT_CONFIG["bos_token_id"], TEXT_CONFIG["eos_token_id"]})
        self._rows = {token: row for row, token in enumerate(self.ids)}
        self._known: dict[str, list[int]] = {}

    @classmethod
    def of_captions(cls, count: int = 1500) -> CompactVocabulary:
        """Every token that `count` random captions use: each word of the wording occurs many times in these."""
        rng = np.random.default_rng(0)
        encode, words = _tokenizer(), set()
        for _ in range(count):
            scene = random_scene(rng)
            words |= set(caption(scene, rng).replace(",", " , ").split()) | set(caption_full(scene).split())
        return cls(token for word in sorted(words) for token in encode(word))

    def rows(self, text: str) -> list[int]:
        """The rows of a caption between start and end. Words are split at spaces and commas, as CLIP splits them."""
        inner = [row for word in text.replace(",", " , ").split() for row in self._word(word)]
        return [len(self.ids) - 2, *inner, len(self.ids) - 1]

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = [self._rows[token] for token in _tokenizer()(word)]
        return self._known[word]


def collate(rows: list[list[int]], end: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows of B captions -> ids, mask and position ids, all int64 [B, T].

    T is the longest caption and one more column: padding at a random position up to the full 77, which stands for all
    the padding of a full-length prompt. Attention is causal and masked, so the real tokens see no difference.
    """
    length = max(map(len, rows)) + 1
    ids = torch.full((len(rows), length), end)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    positions = torch.arange(length).repeat(len(rows), 1)
    limit = TEXT_CONFIG["max_position_embeddings"]
    positions[:, -1] = torch.tensor([int(rng.integers(len(row), limit)) for row in rows])
    return ids, mask, positions


def text_objective(vocabulary: CompactVocabulary) -> TextObjective:
    """A fresh text tower over the compact vocabulary, with its heads."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    size = len(vocabulary.ids)
    special = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    model = CLIPTextModelWithProjection(CLIPTextConfig(**{**TEXT_CONFIG, **special}))
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.3)
    torch.nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.1)
    return TextObjective(model, CLASS_COUNTS, CLASS_COUNTS)


def _text_batch(vocabulary: CompactVocabulary, scenes: list[Scene], rng: np.random.Generator, full: float):
    described = [full_description(s) if rng.random() < full else describe(s, rng) for s in scenes]
    tokens = collate([vocabulary.rows(d.text) for d in described], len(vocabulary.ids) - 1, rng)
    pairs = list(zip(described, scenes, strict=True))
    order_free = stack_targets(attributes(d, s, ordered=False) for d, s in pairs)
    in_order = stack_targets(attributes(d, s, ordered=True) for d, s in pairs)
    return *tokens, order_free, in_order


def train_text(out: Path, *, steps: int = TEXT_STEPS, device: str = "cpu") -> None:
    """Train the text encoder on training scenes and write it."""
    vocabulary = CompactVocabulary.of_captions()
    objective = text_objective(vocabulary).to(device)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([1, step])
        # Captions of two objects are the harder half, so they are as frequent as captions of one.
        scenes = [random_scene(rng, objects=1 + index % 2) for index in range(TEXT_BATCH)]
        batch = _text_batch(vocabulary, scenes, rng, full=0.15)
        return objective.loss(*on_device(batch, device)), {}

    Trainer(objective.train(), loss, _loop(steps), out / "text_encoder.run.safetensors").run(log=log)
    objective.cpu()
    save_text(out / TEXT_FILE, objective, vocabulary)
    for split in ("test", "held_out"):
        log(f"{split} {json.dumps(text_accuracy(objective, vocabulary, split, 2000))}")


@torch.no_grad()
def text_accuracy(objective: TextObjective, vocabulary: CompactVocabulary, split: str, count: int) -> dict:
    """How much of each attribute the heads read from varied captions of a split, by the place they read it from."""
    objective.eval()
    rng = np.random.default_rng(7)
    scenes = [random_scene(rng, split) for _ in range(count)]
    ids, mask, positions, order_free, in_order = _text_batch(vocabulary, scenes, rng, full=0.2)
    pooled, states = objective.read(ids, mask, positions)
    used = states[mask.bool()]
    result = {
        "pooled": objective.pooled_heads.accuracy(pooled, order_free),
        "mean": objective.mean_heads.accuracy(mean_state(states, mask), in_order),
        "end": objective.end_heads.accuracy(states[:, -1], in_order),
    }
    result["summary"] = {place: round(values["all"], 4) for place, values in result.items()}
    result["summary"] |= {"state std": round(float(used.std()), 3), "pooled std": round(float(pooled.std()), 3)}
    return result


def save_text(path: Path, objective: TextObjective, vocabulary: CompactVocabulary) -> None:
    """Write the text tower with its compact token table."""
    tensors = {name: value.contiguous() for name, value in objective.model.state_dict().items()}
    tensors["token_rows"] = torch.tensor(vocabulary.ids)
    _save(path, tensors, "text_encoder", TEXT_CONFIG)


def load_text(path: Path) -> tuple[TextObjective, CompactVocabulary]:
    """Read a file of `save_text`; the heads are fresh."""
    tensors = read_tensors(path)[0]
    vocabulary = CompactVocabulary(tensors.pop("token_rows").tolist())
    objective = text_objective(vocabulary)
    objective.model.load_state_dict(tensors)
    return objective.eval(), vocabulary


def image_objective() -> ImageObjective:
    """A fresh image tower with its training-only heads."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE_CONFIG))
    return ImageObjective(model, TEXT_CONFIG["projection_dim"], CLASS_COUNTS)


def normalise_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> CLIP's normalised float32 [B, 3, H, W]."""
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]


def resized_pictures(pictures: np.ndarray, cache: Path) -> np.ndarray:
    """The pool at the image tower's size (bicubic, as CLIP's preprocessing), rendered into a file once."""
    if not cache.exists():
        side = IMAGE_CONFIG["image_size"]
        partial = cache.with_name(cache.name + ".partial")
        small = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(pictures), side, side, 3))
        for index, picture in enumerate(pictures):
            small[index] = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
        small.flush()
        os.replace(partial, cache)
    return np.load(cache, mmap_mode="r")


@torch.no_grad()
def embed_texts(objective: TextObjective, vocabulary: CompactVocabulary, texts: list[str]) -> Tensor:
    """Captions -> projected pooled states [N, 128]."""
    rng, end = np.random.default_rng(0), len(vocabulary.ids) - 1
    chunks = (texts[start : start + 256] for start in range(0, len(texts), 256))
    return torch.cat([objective.read(*collate([vocabulary.rows(t) for t in c], end, rng))[0] for c in chunks])


def train_image(out: Path, pool: Path, *, steps: int = IMAGE_STEPS, device: str = "cpu") -> None:
    """Train the image encoder on the pool against the text encoder in `out`, and write it."""
    pictures, entries = open_pool(pool, "train")
    pictures = resized_pictures(pictures, out / "train_224.npy")
    scenes = [Scene.from_dict(entry["scene"]) for entry in entries]
    targets = stack_targets(attributes(full_description(s), s, ordered=False) for s in scenes)
    text, vocabulary = load_text(out / TEXT_FILE)
    per_scene = [[entry["caption"], *entry["captions"]] for entry in entries]
    texts = embed_texts(text, vocabulary, [t for group in per_scene for t in group]).unflatten(0, (len(scenes), -1))
    objective = image_objective().to(device)
    batch = min(IMAGE_BATCH, len(scenes))

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        # One pass over the pool after another, each in an order of its own.
        epoch, offset = divmod(step * batch, len(scenes) - len(scenes) % batch)
        chosen = np.sort(np.random.default_rng([2, epoch]).permutation(len(scenes))[offset : offset + batch])
        rng = np.random.default_rng([3, step])
        pixels = _degraded(normalise_pixels(pictures[chosen]), rng)
        index = torch.from_numpy(chosen)
        which = torch.from_numpy(rng.integers(0, texts.shape[1], size=batch))
        given = pixels, texts[index, which], {name: v[index] for name, v in targets.items()}
        return objective.loss(*on_device(given, device)), {}

    Trainer(objective.train(), loss, _loop(steps), out / "image_encoder.run.safetensors").run(log=log)
    save_image(out / IMAGE_FILE, objective.cpu())


def _loop(steps: int) -> LoopConfig:
    return LoopConfig(steps, lr=1e-3, warmup=50, ema_decay=0.0, save_every=250)


def on_device(batch, device: str):
    """Tensors, and tuples and dicts of them, moved to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: on_device(value, device) for name, value in batch.items()}
    return tuple(on_device(value, device) for value in batch)


def _degraded(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """A little noise, and every fourth batch blurred: generated pictures are not as crisp as drawn ones."""
    if rng.random() < 0.25:
        pixels = torch.nn.functional.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return pixels + noise * float(rng.uniform(0, 0.1))


def save_image(path: Path, objective: ImageObjective) -> None:
    """Write the image tower and the projection of text embeddings into its space."""
    tensors = {name: value.contiguous() for name, value in objective.model.state_dict().items()}
    tensors["text_to_image_projection.weight"] = objective.text_to_image_projection.weight.detach()
    _save(path, tensors, "image_encoder", IMAGE_CONFIG)


def _save(path: Path, tensors: dict[str, Tensor], stage: str, config: dict) -> None:
    metadata = {"cascade.stage": stage, "cascade.config": json.dumps(config), "cascade.name": "tiny"}
    write_tensors(tensors, path, metadata)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the CLIP towers of the tiny family.")
    parser.add_argument("task", choices=("text", "image"))
    parser.add_argument("--out", type=Path, required=True, help="directory of the encoders and checkpoints")
    parser.add_argument("--pool", type=Path, help="directory of the pool of pictures")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the recipe's own number")
    parser.add_argument("--device", default=default_device(), help="where to train; default: %(default)s")
    given = parser.parse_args(arguments)
    if given.task == "text":
        train_text(given.out, steps=given.steps or TEXT_STEPS, device=given.device)
    elif given.pool is None:
        parser.error("image needs --pool, the directory that tiny.pool wrote")
    else:
        train_image(given.out, given.pool, steps=given.steps or IMAGE_STEPS, device=given.device)


if __name__ == "__main__":
    main()
