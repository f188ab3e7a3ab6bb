"""Prior preservation: what the base model makes of a class is trained on beside the subject.

Source: Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation" (2022),
section 3.3. There the class pictures are decoded and encoded again; here Stage C's own latents are kept as they are,
which is what it is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...handles import StageHandle
from ...stages import SamplingSettings, encode_text, latent_channels, sample_stage_c
from ...wires import Latent
from ..parts import Parts
from ..settings import Settings
from .buckets import Bucket
from .cache import DiskStore, MemoryStore, ShardWriter, key_of, missing, store_folder
from .encoders import fingerprint
from .reader import PriorLatents

TARGETS = ("lora", "stage_c", "textual_inversion")
# What a latent without a picture can give; its picture embedding is the dropped one.
_GIVEN = frozenset({"stage_c_latent", "text", "text_pooled", "image_embedding", "caption", "name", "loss_weight"})
_BATCH = 4
_STEPS = 20


def check_prior(settings: Settings, needs: frozenset[str]) -> None:
    """ValueError where a run is to have prior preservation and has no use for latents without pictures."""
    if not settings.prior.caption:
        return
    if settings.target not in TARGETS or not needs <= _GIVEN:
        raise ValueError(
            f"prior.caption is {settings.prior.caption!r} and the target {settings.target}, expected one of "
            f"{', '.join(TARGETS)}: the class is made by Stage C as latents, without the pictures that other "
            "targets read; leave 'prior' out."
        )
    if not 0 < settings.prior.share < 1 or settings.prior.pictures < 1:
        raise ValueError(
            f"prior.share is {settings.prior.share:g} and prior.pictures {settings.prior.pictures}, expected a share "
            "between 0 and 1 and at least one picture: correct them, or leave 'prior' out."
        )


def prior_counts(pictures: int, samples: Sequence[int]) -> list[int]:
    """How many of the class pictures have each bucket's shape: as the buckets' samples, at least one each."""
    total = sum(samples)
    return [max(1, round(pictures * count / total)) for count in samples]


def make_prior(
    settings: Settings,
    parts: Parts,
    buckets: Sequence[Bucket],
    counts: Sequence[int],
    root: Path | None,
    device: torch.device,
    report: Callable[[str], None],
) -> PriorLatents:
    """Sample the class latents that are not there yet, with the model's own guidance; picture i has seed + i.

    root: cache folder, or None to keep them in memory. Latents are made anew when Stage C, the text encoder, the
    caption or the seed is another.
    """
    prior = settings.prior
    stage_c, text = _stage_c(settings, parts), parts.load("text_encoder")
    store: DiskStore | MemoryStore = MemoryStore()
    if root is not None:
        depends = {"stage_c": fingerprint(stage_c), "text": fingerprint(text), "own": stage_c.info.defaults}
        store = DiskStore(store_folder(root, "prior", {**depends, "steps": _STEPS}))
    keys = [
        [key_of("prior", prior.caption, *bucket, settings.seed + i) for i in range(count)]
        for bucket, count in zip(buckets, counts, strict=True)
    ]
    lacking = [missing(store, those) for those in keys]
    if any(lacking):
        report(f"Stage C makes {sum(map(len, lacking))} latents of '{prior.caption}' for prior preservation.")
        stage_c = stage_c.to(device)
        texts = [encode_text(text, caption) for caption in (prior.caption, "")]
        # One sequence each: a caption is cut to 77 tokens, as all captions of a training are.
        texts = [condition._replace(hidden=condition.hidden[:, :77]) for condition in texts]
        writer = ShardWriter(store)
        for bucket, those, wanted in zip(buckets, keys, lacking, strict=True):
            for start in range(0, len(wanted), _BATCH):
                chunk = wanted[start : start + _BATCH]
                numbers = tuple(those.index(key) for key in chunk)
                shape = (len(chunk), latent_channels(stage_c), bucket.latent_height, bucket.latent_width)
                latent = Latent(torch.zeros(shape), bucket.width, bucket.height, batch_index=numbers)
                how = SamplingSettings(steps=_STEPS)
                made = sample_stage_c(stage_c, *texts, latent, seed=settings.seed, settings=how)
                for key, sample in zip(chunk, made.samples, strict=True):
                    writer.add(key, {"value": sample.float().cpu()})
        writer.flush()
    return PriorLatents(store, keys, prior.caption, prior.loss_weight)


def _stage_c(settings: Settings, parts: Parts) -> StageHandle:
    """The model that training starts from."""
    init = settings.models.init
    if settings.target == "stage_c" and init != "none":
        return Parts(replace(settings.models, stage_c=init)).load("stage_c")
    return parts.load("stage_c")
