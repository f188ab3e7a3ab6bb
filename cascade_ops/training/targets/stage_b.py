"""Stage B from scratch or fine-tuned: noise in Stage A's latents is predicted from a Stage C latent and pooled text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints import save
from ...models import LatentEncoder, StageB
from ...models.effnet import normalize_imagenet
from ...sizes import ENCODER_COMPRESSION
from ..diffusion_loss import DiffusionLoss, replaced
from ..draws import Draws
from ..frozen import frozen_copy
from ..memory_saving import checkpoint_blocks
from ..new_models import trained_model
from ..noise import offset_noise, pyramid_noise
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings
from ..stage_c_loss import empty_prompt

# Of the samples whose Stage C latent gets noise; the rest sees it as the encoder gives it.
_NOISED_SHARE = 0.6


class StageBObjective(Objective):
    """The diffusion loss of Stage B; source: the reference's ``train/train_b.py``.

    A sampled Stage C latent is never as good as an encoded one. So some samples see theirs dropped, encoded from a
    smaller picture (``loss.rescale``; then `encoder` is needed and latents are not cached), or, beyond the reference,
    with noise on it (``loss.condition_noise``).
    """

    def __init__(
        self,
        module: StageB,
        settings: Settings,
        empty_pooled: Tensor,
        config: dict,
        defaults: dict,
        encoder: LatentEncoder | None = None,
    ):
        super().__init__()
        self.module, self.settings, self.config, self.defaults = module, settings, config, defaults
        self.empty_pooled = empty_pooled.detach().float().reshape(1, 1, -1)
        self.loss = DiffusionLoss(settings.loss)
        # In a list: a frozen part is neither saved nor spread over devices with what is trained.
        self._encoder = [encoder]
        source = "stage_c_latent" if encoder is None else "image"
        self.needs = frozenset({"stage_a_latent", source, "text_pooled"})

    def condition(self, batch: Batch, draws: Draws) -> Tensor:
        """Stage C latents ``[B, 16, h, w]`` as this training lets Stage B see them."""
        loss, (encoder,) = self.settings.loss, self._encoder
        if encoder is None:
            latent = batch["stage_c_latent"].float()
        else:
            image = batch["image"]
            factor = loss.rescale + (1 - loss.rescale) * torch.rand((), generator=draws.shared()).item()
            size = [
                max(1, round(side * factor / ENCODER_COMPRESSION)) * ENCODER_COMPRESSION for side in image.shape[-2:]
            ]
            self._encoder = [encoder.to(image.device)]
            with torch.no_grad():
                latent = encoder(normalize_imagenet(F.interpolate(image, size=size, mode="nearest")))
        if loss.condition_noise:
            level = draws.uniform(1, 1, 1) * loss.condition_noise * draws.chosen(_NOISED_SHARE, 1, 1, 1)
            latent = latent + (level * draws.normal(*latent.shape[1:])).to(latent.device)
        return replaced(latent, draws.chosen(loss.latent_dropout), torch.zeros(1, 1, 1, 1))

    def noise(self, shape: Sequence[int], draws: Draws) -> Tensor:
        """Unit noise ``[B, C, H, W]`` for latents of ``shape`` ``(C, H, W)``.

        Pyramid noise teaches a model not to read a picture's colours out of the noise, but sampling starts from white
        noise: with a `loss.pyramid_share` below 1 some samples see that.
        """
        loss = self.settings.loss
        if not loss.pyramid_noise:
            return offset_noise(shape, draws, loss.offset_noise)
        noise = pyramid_noise(shape, draws)
        if loss.pyramid_share == 1:
            return noise
        white = offset_noise(shape, draws, loss.offset_noise)
        return torch.where(draws.chosen(loss.pyramid_share, 1, 1, 1), noise, white)

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        latent = batch["stage_a_latent"].float()
        condition = self.condition(batch, draws)
        pooled = replaced(
            batch["text_pooled"].float(), draws.chosen(self.settings.data.caption_dropout), self.empty_pooled
        )
        noise = self.noise(latent.shape[1:], draws)
        return self.loss(
            lambda x, r: self.module(x, r, condition, pooled), latent, noise, draws, batch.get("loss_weight")
        )

    def export(self, folder: Path, name: str) -> list[Path]:
        path = folder / f"{name}.safetensors"
        model = self.settings.name or None
        return [save(self.module, path, stage="stage_b", config=self.config, defaults=self.defaults, name=model)]


def build(settings: Settings, parts: Parts) -> StageBObjective:
    """Stage B from `models.init` or new, with the text encoder's empty prompt."""
    module, config, defaults = trained_model(settings, "stage_b")
    checkpoint_blocks(module, settings.gradient_checkpointing)
    empty = empty_prompt(parts.load("text_encoder"))
    encoder = frozen_copy(parts.load("latent_encoder").module) if settings.loss.rescale < 1 else None
    return StageBObjective(module, settings, empty.pooled, config, defaults, encoder)
