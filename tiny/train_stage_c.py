"""Train the tiny Stage C on cached latents and captions.

    python -m stable_cascade_nodes.tiny.train_stage_c --out DIR

Needs the finished text encoder and latent encoder in ``--out``. The picture input of Stage C sees zeros throughout:
this family follows text only.
"""

import numpy as np
import torch
from torch import Tensor

from ..cascade_ops.checkpoints import load
from ..cascade_ops.diffusion import AdaptiveLossWeight
from ..cascade_ops.models import StageC
from ..cascade_ops.text import TextEncoder
from ..cascade_ops.tokenizer import pad_tokens
from ..cascade_ops.training.diffusion import diffusion_loss
from ..cascade_ops.training.loop import LoopConfig, Trainer
from .family import IMAGE_WIDTH, STAGE_C
from .latents import caption_tokens, stage_c_latents, take
from .publish import save_part
from .recipe import log, parse

BATCH = 64
EXTRA_SCENES = 30_000
# Share of the batch that sees its caption; the rest sees the empty prompt, which guidance needs.
CAPTION_SHARE = 0.9
# Share of the run after which every caption is padded to CLIP's full 77 tokens. Shorter sequences cost half as much;
# padding is what the encoder gives when sampling, so the model has to end on it.
FULL_LENGTH_FROM = 0.9


def adaptive_weight() -> AdaptiveLossWeight:
    """The loss weight for small batches; the reference's 300 buckets would fill too slowly."""
    return AdaptiveLossWeight(24, (-9.3, 9.3), beta=0.97, weight_range=(1e-7, 300.0), interpolate=True)


class CaptionSampler:
    """Random captions as the text encoder sees them, some dropped.

    Args:
        tokens: int32 ``[N, captions, 77]``.
    """

    def __init__(self, encoder: TextEncoder, tokens: np.ndarray):
        self.encoder, self.tokens = encoder, tokens
        self.empty = torch.tensor(pad_tokens([])[0])

    @torch.no_grad()
    def __call__(
        self, index: Tensor, kept: Tensor, full_length: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Encode one caption of each scene in ``index [B]``; the empty prompt where ``kept [B]`` is False.

        Returns hidden states ``[B, T, C]`` and the pooled state ``[B, 1, P]``; T is 77 or the longest caption.
        """
        choice = torch.randint(self.tokens.shape[1], (len(index),), generator=generator)
        ids = torch.from_numpy(self.tokens[index.numpy(), choice.numpy()]).long()
        ids = torch.where(kept[:, None], ids, self.empty)
        lengths = (ids == self.empty[-1]).int().argmax(dim=1) + 1
        longest = ids.shape[1] if full_length else int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        device = self.encoder.device
        hidden, pooled = self.encoder.encode_tokens(ids[:, :longest].to(device), mask.long().to(device))
        return hidden, pooled[:, None]


def main(arguments: list[str] | None = None) -> None:
    given = parse("Train the tiny Stage C.", 5500, arguments)
    encoder, _ = load(given.out / "latent_encoder.safetensors", expect="latent_encoder")
    text, _ = load(given.out / "text_encoder.safetensors", expect="text_encoder", device=given.device)
    latents = stage_c_latents(given.pool, encoder, given.out / "latents_c.npy", EXTRA_SCENES)
    captions = CaptionSampler(text, caption_tokens(given.pool, given.out / "tokens.npy", EXTRA_SCENES))
    torch.manual_seed(0)
    model = StageC(**STAGE_C).train().to(given.device)
    weight = adaptive_weight()
    no_picture = torch.zeros(BATCH, 1, IMAGE_WIDTH, device=given.device)

    def loss(step: int, generator: torch.Generator):
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        latent = take(latents, index).to(given.device)
        kept = torch.rand(BATCH, generator=generator) < CAPTION_SHARE
        hidden, pooled = captions(index, kept, step >= FULL_LENGTH_FROM * given.steps, generator)
        noise = torch.randn(latent.shape, generator=generator).to(given.device)
        return diffusion_loss(lambda x, r: model(x, r, hidden, pooled, no_picture), latent, noise, generator, weight)

    config = LoopConfig(given.steps, lr=2e-3, warmup=300, ema_decay=0.998, log_every=100, save_every=500)
    trainer = Trainer(model, loss, config, given.out / "stage_c.run.safetensors", weight)
    trainer.run(log=log)
    with trainer.averaged():
        save_part(model, given.out / "stage_c.safetensors", "stage_c", STAGE_C)


if __name__ == "__main__":
    main()
