"""Measure what pictures and adapters do on the tiny family, each with and without it, on inputs that no training saw.

    python -m stable_cascade_nodes.tiny.evaluate_adapters --out docs/tiny/adapters.md

``--adapters DIR`` measures those of another folder, ``--only NAME`` one of them; what is not there is left out.
``--samples DIR`` writes contact sheets: what was given, and what was made with and without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..cascade_ops.adapters.dialects import read_lora
from ..cascade_ops.adapters.lora import apply_lora
from ..cascade_ops.adapters.tokens import with_tokens
from ..cascade_ops.checkpoints import load
from ..cascade_ops.denoisers import SteppedAdapter
from ..cascade_ops.handles import load_stage
from . import measure_pictures as pictures
from .adapter_inputs import (
    edge_f1,
    edges_of,
    enlarged,
    identities,
    masked,
    object_mask,
    other_object,
    psnr_where,
)
from .captions import background_phrase, caption_full, unplaced
from .evaluate import Family, contact_sheet, measured_scenes, psnr, shares
from .family import IMAGE_SIZE, WEIGHTS
from .looks import has_look, look_caption, look_scene, render_look
from .measuring import SEED, Attach, Measured, Row, chain, drawn, steered_by
from .recipe import ADAPTERS

# Sides of the pictures that are made larger. Flat shapes of 128 pixels lose next to nothing by bicubic enlargement.
SMALL_SIDES = (128, 32)


def lora(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """The look appears with its word, and neither without the word nor without the LoRA."""
    rng = np.random.default_rng(SEED)
    scenes = [look_scene(rng, "test") for _ in range(count)]
    handle = load_stage(weights / "stage_c.safetensors", "stage_c", dtype="float32")
    text = load_stage(weights / "text_encoder.safetensors", "text_encoder", dtype="float32")
    learned = read_lora(path, handle.module)
    changed, _ = apply_lora(handle, learned)
    adapted = replace(family, stage_c=changed.module, text=with_tokens(text, learned.tokens).module)
    with_word, without_word = [look_caption(scene) for scene in scenes], [caption_full(scene) for scene in scenes]
    made = chain(adapted, with_word, SEED)
    plain, base = chain(adapted, without_word, SEED), chain(family, with_word, SEED)

    def share(pictures: np.ndarray) -> float:
        return float(np.mean([has_look(picture) for picture in pictures]))

    rows = [
        Row("LoRA", "the look; without: the LoRA, but not its word", share(made), share(plain), ".90 / .05"),
        Row("LoRA", "the look; without: the word, but no LoRA", share(made), share(base), ".90 / .05"),
    ]
    truth = np.stack([render_look(scene) for scene in scenes])
    return Measured(rows, (truth, made, plain))


def canny_edges(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """Edges of the picture, with a prompt that says neither where nor how large."""
    scenes = measured_scenes(count, "test", 1)
    truth, prompts = drawn(scenes), [unplaced(scene) for scene in scenes]
    made, plain = chain(family, prompts, SEED, steered_by(path, edges_of(truth))), chain(family, prompts, SEED)
    read, unread = shares(scenes, made), shares(scenes, plain)
    rows = [Row("canny", "F1 of edges", edge_f1(made, truth), edge_f1(plain, truth), ".70 / .30")]
    rows += [Row("canny", name, read[name], unread[name]) for name in ("position", "size", "shape", "colour")]
    return Measured(rows, (truth, made, plain))


def inpainting(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """The object is cut out, and the prompt asks for another one."""
    rng = np.random.default_rng(SEED)
    scenes = measured_scenes(count, "test", 1)
    wanted = [other_object(scene, rng) for scene in scenes]
    truth, masks = drawn(scenes), np.stack([object_mask(scene) for scene in scenes])
    prompts = [caption_full(scene) for scene in wanted]
    made, plain = chain(family, prompts, SEED, steered_by(path, masked(truth, masks))), chain(family, prompts, SEED)
    read, unread = shares(wanted, made), shares(wanted, plain)
    outside = [psnr_where(pictures, truth, ~masks) for pictures in (made, plain)]
    rows = [
        Row("inpainting", "PSNR outside of the mask", *outside, "26 dB", "dB"),
        Row("inpainting", "colour asked for inside", read["colour"], unread["colour"], ".80"),
        Row("inpainting", "colour and shape asked for inside", read["colour and shape"], unread["colour and shape"]),
    ]
    given = np.where(masks[..., None], 255, truth).astype(np.uint8)
    return Measured(rows, (given, made, plain))


def super_resolution(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """Small pictures to 256 pixels without a prompt, against bicubic enlargement."""
    scenes = measured_scenes(count, "test", 1)
    truth, rows, pictures = drawn(scenes), [], []
    for side in SMALL_SIDES:
        small = drawn(scenes, side)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        bicubic = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in small])
        made = chain(family, [""] * count, SEED, steered_by(path, enlarged(family.encoder, small)))
        kept, kept_by_bicubic = shares(scenes, made)["all"], shares(scenes, bicubic)["all"]
        what = f"from {side} pixels; without: bicubic"
        rows += [
            Row("super-resolution", f"PSNR {what}", psnr(made, truth), psnr(bicubic, truth), "+1 dB", "dB"),
            Row("super-resolution", f"all attributes kept {what}", kept, kept_by_bicubic),
        ]
        pictures += [made, bicubic]
    return Measured(rows, (truth, *pictures))


def identity(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """The object is told by its vector and its box, the prompt says the background alone."""
    scenes = measured_scenes(count, "test", 1)
    prompts = [background_phrase(scene) for scene in scenes]
    made, plain = chain(family, prompts, SEED, steered_by(path, identities(scenes))), chain(family, prompts, SEED)
    read, unread = shares(scenes, made), shares(scenes, plain)
    names = ("colour", "shape", "position", "size", "background")
    return Measured([Row("identity", name, read[name], unread[name]) for name in names], (drawn(scenes), made, plain))


def ip_adapter(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """A picture as the prompt, without words."""
    scenes = measured_scenes(count, "test", 1)
    truth, prompts = drawn(scenes), [""] * count
    adapter, _ = load(path, expect="ip_adapter", dtype=torch.float32)
    embeddings = pictures.embedded(family, truth)

    def attach(start: int, stop: int) -> dict:
        return {"adapters": [SteppedAdapter(adapter, embeddings[start:stop])]}

    made, plain = chain(family, prompts, SEED, attach), chain(family, prompts, SEED)
    read, unread = shares(scenes, made), shares(scenes, plain)
    rows = [
        Row("IP-Adapter", "background colour", read["background colour"], unread["background colour"], ".90"),
        Row("IP-Adapter", "object colour", read["colour"], unread["colour"], ".75"),
        Row("IP-Adapter", "shape", read["shape"], unread["shape"]),
    ]
    return Measured(rows, (truth, made, plain))


def ip_adapter_and_words(family: Family, weights: Path, path: Path, count: int) -> Measured:
    adapter, _ = load(path, expect="ip_adapter", dtype=torch.float32)

    def attach_of(shown: np.ndarray) -> Attach:
        embeddings = pictures.embedded(family, shown)
        return lambda start, stop: {"adapters": [SteppedAdapter(adapter, embeddings[start:stop])]}

    return pictures.beside_words("IP-Adapter", family, attach_of, count)


@dataclass(frozen=True)
class Measure:
    """file: the adapter, or the part of the family, that it is about. run: takes the family, its folder, that file and
    how many pictures of each kind to make."""

    file: str
    run: Callable[[Family, Path, Path, int], Measured]


MEASURES = {
    "image_prompt": Measure("image_encoder", pictures.image_variation),
    "image_prompt_and_words": Measure("image_encoder", pictures.image_prompt_and_words),
    "ip_adapter": Measure("ip_adapter", ip_adapter),
    "ip_adapter_and_words": Measure("ip_adapter", ip_adapter_and_words),
    "lora": Measure("lora", lora),
    "controlnet_canny": Measure("controlnet_canny", canny_edges),
    "controlnet_identity": Measure("controlnet_identity", identity),
    "controlnet_inpainting": Measure("controlnet_inpainting", inpainting),
    "held_inpainting": Measure("controlnet_inpainting", pictures.held_inpainting),
    "controlnet_super_resolution": Measure("controlnet_super_resolution", super_resolution),
    "refined_super_resolution": Measure("controlnet_super_resolution", pictures.refined_super_resolution),
    "there_and_back": Measure("latent_encoder", pictures.reconstruction),
}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| feature | measured | with | without | wanted |", "|" + " --- |" * 5]
    for row in rows:
        figures = [
            "" if value is None else f"{value:.1f} dB" if row.unit == "dB" else f"{value:.2f}"
            for value in (row.with_it, row.without)
        ]
        lines.append(f"| {row.feature} | {row.measure} | {' | '.join(figures)} | {row.wanted} |")
    return "\n".join(lines)


def sheet(pictures: Sequence[np.ndarray], columns: int = 8) -> Image.Image:
    """The first pictures of each kind, one kind per row."""
    return contact_sheet([picture for group in pictures for picture in group[:columns]], min(columns, len(pictures[0])))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what pictures and adapters do, with and without them.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with the parts of the family")
    parser.add_argument("--adapters", type=Path, help="folder with the adapters; default: that of the family")
    parser.add_argument("--only", choices=MEASURES, help="measure this one")
    parser.add_argument("--count", type=int, default=50, help="pictures of each kind")
    parser.add_argument("--samples", type=Path, help="folder for contact sheets")
    parser.add_argument("--out", type=Path, help="file for the table")
    given = parser.parse_args(arguments)
    family, rows = Family.load(given.weights), []
    for name, measure in MEASURES.items():
        folder = given.adapters if given.adapters and measure.file in ADAPTERS else given.weights
        path = folder / f"{measure.file}.safetensors"
        if (given.only and name != given.only) or not path.is_file():
            continue
        measured = measure.run(family, given.weights, path, given.count)
        rows += measured.rows
        print(table(measured.rows), flush=True)
        if given.samples:
            given.samples.mkdir(parents=True, exist_ok=True)
            sheet(measured.pictures).save(given.samples / f"{name}.jpg", quality=90)
    if given.out:
        given.out.write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
