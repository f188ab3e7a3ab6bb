"""What pictures as input do, measured on the tiny family: variation, a picture beside words, held inpainting.

`evaluate_adapters` runs these too. Each measures with the feature and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cascade_ops import stages
from ..cascade_ops.attachments import apply_control
from ..cascade_ops.control_inputs import inpainting_input
from ..cascade_ops.denoisers import TextCondition
from ..cascade_ops.encoding import encode_stage_a
from ..cascade_ops.handles import StageHandle, load_stage
from ..cascade_ops.masks import feathered
from ..cascade_ops.wires import Latent
from .adapter_inputs import enlarged, object_mask, other_object, psnr_where
from .captions import caption_full, object_phrase
from .checker import read_picture
from .drawing import Scene
from .evaluate import BATCH, Family, measured_scenes, psnr, reconstruct, shares
from .family import IMAGE_SIZE
from .measuring import SEED, Attach, Measured, Row, chain, drawn, steered_by

# In pixels of a picture of 256: how softly a hole's border goes over into what is kept.
FEATHER = 12


def embedded(family: Family, pictures: np.ndarray) -> Tensor:
    """CLIP embeddings ``[N, 1, 96]``."""
    return torch.cat([family.embed(part) for part in np.array_split(pictures, -(-len(pictures) // BATCH))])


def seen(embeddings: Tensor) -> Attach:
    """Stage C's own image tokens."""
    return lambda start, stop: {"image": embeddings[start:stop]}


def image_variation(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """A picture as the prompt, without words, through Stage C's own image tokens."""
    scenes = measured_scenes(count, "test", 1)
    truth, prompts = drawn(scenes), [""] * count
    made, plain = chain(family, prompts, SEED, seen(embedded(family, truth))), chain(family, prompts, SEED)
    read, unread = shares(scenes, made), shares(scenes, plain)
    rows = [
        Row("image prompt", "background colour", read["background colour"], unread["background colour"], ".90"),
        Row("image prompt", "object colour", read["colour"], unread["colour"], ".75"),
        Row("image prompt", "shape", read["shape"], unread["shape"]),
    ]
    return Measured(rows, (truth, made, plain))


def words_and_picture(count: int) -> tuple[list[Scene], list[Scene]]:
    """Scenes to show as a picture, and what to make: their plain backgrounds behind another object, told in words."""
    scenes = measured_scenes(8 * count + 16, "test", 1)
    half = len(scenes) // 2
    shown = [scene for scene in scenes[:half] if scene.pattern == "plain"]
    pairs = [(scene, replace(scene, objects=other.objects)) for scene, other in zip(shown, scenes[half:], strict=False)]
    # An object in the colour of its background cannot be seen.
    clear = [pair for pair in pairs if pair[1].background != pair[1].objects[0].colour][:count]
    return [scene for scene, _ in clear], [scene for _, scene in clear]


def beside_words(name: str, family: Family, attach_of, count: int) -> Measured:
    """The background is shown and the object is told: both must be there. `attach_of` takes the pictures."""
    shown, wanted = words_and_picture(count)
    pictures, prompts = drawn(shown), [object_phrase(scene.objects[0]) for scene in wanted]
    made, plain = chain(family, prompts, SEED, attach_of(pictures)), chain(family, prompts, SEED)
    read, unread = shares(wanted, made), shares(wanted, plain)
    rows = [
        Row(f"{name} and words", f"{measure}, {source}", read[measure], unread[measure])
        for measure, source in (
            ("background colour", "which the picture shows"),
            ("colour", "which the words say"),
            ("shape", "which the words say"),
            ("size", "which the words say"),
            ("position", "which the words say"),
        )
    ]
    return Measured(rows, (pictures, made, plain))


def image_prompt_and_words(family: Family, weights: Path, path: Path, count: int) -> Measured:
    return beside_words("image prompt", family, lambda pictures: seen(embedded(family, pictures)), count)


def reconstruction(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """Pictures through the latent encoder and back; without: the encoder's latent is left out (zeros)."""
    scenes = measured_scenes(count, "test", 1)
    truth = drawn(scenes)
    made = reconstruct(family, truth, SEED)
    plain = reconstruct(replace(family, encoder=_Blind(family.encoder)), truth, SEED)
    read, unread = shares(scenes, made), shares(scenes, plain)
    rows = [Row("reconstruction", "PSNR", psnr(made, truth), psnr(plain, truth), "25 dB", "dB")]
    rows += [Row("reconstruction", name, read[name], unread[name]) for name in ("colour", "shape", "position")]
    return Measured(rows, (truth, made, plain))


class _Blind(torch.nn.Module):
    """An encoder that says nothing of the picture."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self._encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.zeros_like(self._encoder(pixels))


def held_inpainting(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """One of two objects is replaced: ControlNet for Stage C, and Stage B held at the original outside of the hole."""
    rng = np.random.default_rng(SEED)
    scenes = measured_scenes(count, "test", 2)
    wanted = [_other_first(scene, rng) for scene in scenes]
    truth = drawn(scenes)
    masks = np.stack([object_mask(replace(scene, objects=scene.objects[:1])) for scene in scenes])
    prompts = [caption_full(scene) for scene in wanted]
    handles = {
        name: load_stage(weights / f"{name}.safetensors", name, dtype="float32")
        for name in ("text_encoder", "stage_c", "stage_b", "stage_a")
    }
    network = load_stage(path, "controlnet", dtype="float32")
    made = np.concatenate(
        [
            _inpainted(handles, network, prompts[i : i + BATCH], truth[i : i + BATCH], masks[i : i + BATCH], SEED + i)
            for i in range(0, count, BATCH)
        ]
    )
    plain = chain(family, prompts, SEED)
    outside = [psnr_where(pictures, truth, ~masks) for pictures in (made, plain)]
    inside = [_share_inside(wanted, pictures) for pictures in (made, plain)]
    rows = [
        Row("inpainting, held", "PSNR outside of the mask", *outside, "26 dB", "dB"),
        Row("inpainting, held", "colour asked for inside", *inside, ".80"),
    ]
    given = np.where(masks[..., None], 255, truth).astype(np.uint8)
    return Measured(rows, (given, made, plain))


@dataclass(frozen=True)
class Enlargement:
    """Pictures of `side` pixels with noise, in parts of full scale; Stage B refines the enlarged ones from `start`."""

    side: int
    noise: float
    start: float
    steps: int

    def describe(self) -> str:
        noisy = f" with noise of {self.noise:g}" if self.noise else ""
        return f"PSNR from {self.side} pixels{noisy}, Stage B from {self.start:g}; without: bicubic"


ENLARGEMENTS = (Enlargement(64, 0.0, 0.02, 1), Enlargement(128, 0.1, 0.1, 2))


def refined_super_resolution(family: Family, weights: Path, path: Path, count: int) -> Measured:
    """Small pictures to 256 pixels: Stage C from the ControlNet, Stage B started from the enlarged picture."""
    scenes = measured_scenes(count, "test", 1)
    truth, rows, pictures = drawn(scenes), [], []
    stage_a, stage_b = (load_stage(weights / f"{n}.safetensors", n, dtype="float32") for n in ("stage_a", "stage_b"))
    text = family.conditions([""])[1]
    for case in ENLARGEMENTS:
        small = _noisy(drawn(scenes, case.side), case.noise)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        bicubic = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in small])
        attach = steered_by(path, enlarged(family.encoder, small))
        settings, made = stages.SamplingSettings(steps=case.steps, start=case.start), []
        for start in range(0, count, BATCH):
            stop = min(start + BATCH, count)
            samples = family.sample_c([""] * (stop - start), SEED + start, attach(start, stop))
            large = encode_stage_a(stage_a, torch.from_numpy(bicubic[start:stop]).float() / 255)
            refined = stages.sample_stage_b(
                stage_b,
                Latent(samples, IMAGE_SIZE, IMAGE_SIZE),
                text,
                text,
                seed=SEED + start,
                settings=settings,
                start_latent=large,
            )
            made.append(stages.decode_stage_a(stage_a, refined).mul(255).round().byte().numpy())
        result = np.concatenate(made)
        rows.append(
            Row("super-resolution", case.describe(), psnr(result, truth), psnr(bicubic, truth), "+1 dB", unit="dB")
        )
        pictures += [result, bicubic]
    return Measured(rows, (truth, *pictures))


def _noisy(pictures: np.ndarray, noise: float) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    return np.clip(pictures + rng.normal(0, 255 * noise, pictures.shape), 0, 255).round().astype(np.uint8)


def _other_first(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with its first object replaced by one whose colour nothing in it has."""
    while True:
        changed = other_object(replace(scene, objects=scene.objects[:1]), rng).objects[0]
        if changed.colour != scene.objects[1].colour:
            return replace(scene, objects=(changed, scene.objects[1]))


def _inpainted(
    handles: dict[str, StageHandle],
    network: StageHandle,
    prompts: Sequence[str],
    pictures: np.ndarray,
    masks: np.ndarray,
    seed: int,
) -> np.ndarray:
    """What the graph `inpaint` does, for a batch."""
    images = torch.from_numpy(pictures).float() / 255
    holes = torch.from_numpy(masks).float()
    stage_c = apply_control(handles["stage_c"], network, inpainting_input(images, holes))
    encoded = [stages.encode_text(handles["text_encoder"], prompt) for prompt in prompts]
    text = TextCondition(torch.cat([e.hidden for e in encoded]), torch.cat([e.pooled for e in encoded]))
    empty = stages.encode_text(handles["text_encoder"], "")
    settings = stages.SamplingSettings(steps=stage_c.info.defaults["steps"])
    start = stages.empty_latent(stage_c, batch_size=len(pictures))
    latent = stages.sample_stage_c(stage_c, text, empty, start, seed=seed, settings=settings)
    original: Latent = replace(
        encode_stage_a(handles["stage_a"], images), mask=feathered(holes, grow=FEATHER, feather=FEATHER)
    )
    settings = stages.SamplingSettings(steps=handles["stage_b"].info.defaults["steps"])
    detailed = stages.sample_stage_b(
        handles["stage_b"], latent, text, empty, seed=seed, settings=settings, start_latent=original
    )
    return stages.decode_stage_a(handles["stage_a"], detailed).mul(255).round().byte().numpy()


def _share_inside(wanted: Sequence[Scene], pictures: np.ndarray) -> float:
    """Share of the pictures where an object of the colour asked for stands where it was asked for."""
    found = []
    for scene, picture in zip(wanted, pictures, strict=True):
        item = scene.objects[0]
        seen_objects = read_picture(picture).objects
        found.append(any((o.colour, o.position) == (item.colour, item.position) for o in seen_objects))
    return float(np.mean(found))
