"""Train the tiny Stage B on cached latents of Stage A and of the latent encoder.

    python -m stable_cascade_nodes.tiny.train_stage_b --out DIR

Needs the finished Stage A, latent encoder and text encoder in ``--out``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cascade_ops.checkpoints import load
from ..cascade_ops.models import StageB
from ..cascade_ops.training.diffusion import diffusion_loss, pyramid_noise
from ..cascade_ops.training.loop import LoopConfig, Trainer
from .family import STAGE_B, STAGE_B_SIZE
from .latents import caption_tokens, stage_a_latents, stage_c_latents, take
from .publish import save_part
from .recipe import log, parse
from .train_stage_c import EXTRA_SCENES, CaptionSampler, adaptive_weight

PICTURES = 16_000
BATCH = 16
# The first steps see a quarter of the picture, which costs a quarter; the others see all of it.
CROP = STAGE_B_SIZE // 2
FULL_FROM = 0.5
FULL_BATCH = 6
# Stage C's latents are not perfect when sampled; a noised condition is what keeps Stage B from trusting every digit.
LARGEST_CONDITION_NOISE, NOISED_SHARE, DROPPED_SHARE = 0.25, 0.6, 0.1
CAPTION_SHARE = 0.9


def degrade(condition: Tensor, generator: torch.Generator) -> Tensor:
    """Stage C latents ``[B, C, h, w]``: noise on some, zeros instead of some."""
    batch = len(condition)
    level = torch.rand(batch, 1, 1, 1, generator=generator) * LARGEST_CONDITION_NOISE
    level = level * (torch.rand(batch, 1, 1, 1, generator=generator) < NOISED_SHARE)
    kept = torch.rand(batch, 1, 1, 1, generator=generator) >= DROPPED_SHARE
    return (condition + level * torch.randn(condition.shape, generator=generator)) * kept


def crop(tensors: list[tuple[Tensor, int]], size: int, generator: torch.Generator) -> list[Tensor]:
    """The same random part of every tensor ``[B, C, n size, n size]``, each given with its scale ``n``.

    ``size`` counts the positions that the tensors share.
    """
    whole = tensors[0][0].shape[-1] // tensors[0][1]
    y, x = torch.randint(whole - size + 1, (2,), generator=generator).tolist()
    return [t[..., y * n : (y + size) * n, x * n : (x + size) * n] for t, n in tensors]


def main(arguments: list[str] | None = None) -> None:
    given = parse("Train the tiny Stage B.", 44_000, arguments)
    stage_a, _ = load(given.out / "stage_a.safetensors", expect="stage_a")
    encoder, _ = load(given.out / "latent_encoder.safetensors", expect="latent_encoder")
    text, _ = load(given.out / "text_encoder.safetensors", expect="text_encoder", device=given.device)
    targets = stage_a_latents(given.pool, stage_a, given.out / "latents_a.npy", PICTURES)
    conditions = stage_c_latents(given.pool, encoder, given.out / "latents_c.npy", EXTRA_SCENES)
    captions = CaptionSampler(text, caption_tokens(given.pool, given.out / "tokens.npy", EXTRA_SCENES))
    torch.manual_seed(0)
    model = StageB(**STAGE_B).train().to(given.device)
    patch = model.patch_size
    weight = adaptive_weight()

    def loss(step: int, generator: torch.Generator):
        whole = step >= FULL_FROM * given.steps
        batch = FULL_BATCH if whole else BATCH
        index = torch.randint(len(targets), (batch,), generator=generator)
        latent, condition = take(targets, index), degrade(take(conditions, index), generator)
        _, pooled = captions(index, torch.rand(batch, generator=generator) < CAPTION_SHARE, False, generator)
        # Pyramid noise is drawn for the whole picture, so that a crop sees what a whole picture would show there.
        noise = pyramid_noise(latent.shape, generator)
        if not whole:
            tokens = STAGE_B_SIZE // patch
            condition = F.interpolate(condition, size=(tokens, tokens), mode="bilinear", align_corners=True)
            latent, noise, condition = crop([(latent, patch), (noise, patch), (condition, 1)], CROP // patch, generator)
        latent, noise, condition = (part.to(given.device) for part in (latent, noise, condition))
        return diffusion_loss(lambda x, r: model(x, r, condition, pooled), latent, noise, generator, weight)

    config = LoopConfig(given.steps, lr=1.5e-3, warmup=300, ema_decay=0.998, log_every=100, save_every=500)
    trainer = Trainer(model, loss, config, given.out / "stage_b.run.safetensors", weight)
    trainer.run(log=log)
    with trainer.averaged():
        save_part(model, given.out / "stage_b.safetensors", "stage_b", STAGE_B)


if __name__ == "__main__":
    main()
