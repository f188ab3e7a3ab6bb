"""What every training of or through Stage C shares: the conditions it sees, the latents it is asked about."""

from __future__ import annotations

import torch
from torch import Tensor

from ..denoisers import TextCondition
from .diffusion_loss import DiffusionLoss, Predictor, replaced
from .draws import Draws
from .noise import offset_noise
from .objective import Batch, StepResult
from .settings import Settings


class StageCLoss:
    """Conditions with their dropouts, and the diffusion loss on Stage C latents.

    empty_text: the empty prompt ``[1, 77, C]``, ``[1, 1, P]`` or ``[1, P]``, which a dropped caption becomes.
    image_width: of the picture embeddings; a dropped or missing one is zeros.
    """

    def __init__(self, settings: Settings, empty_text: TextCondition, image_width: int):
        self.data, self.offset = settings.data, settings.loss.offset_noise
        self.hidden = empty_text.hidden.detach().float()
        self.pooled = empty_text.pooled.detach().float().reshape(1, 1, -1)
        self.image_width = image_width
        self.diffusion = DiffusionLoss(settings.loss)
        self.observe, self.state, self.load_state = (
            self.diffusion.observe,
            self.diffusion.state,
            self.diffusion.load_state,
        )

    @property
    def reads_pictures(self) -> bool:
        """Whether any sample keeps its picture embedding."""
        return self.data.image_embedding_dropout < 1

    def conditions(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Text ``[B, 77, C]``, pooled text ``[B, 1, P]`` and picture ``[B, 1, E]``, each dropped by itself."""
        without_text = draws.chosen(self.data.caption_dropout)
        text = replaced(batch["text"].float(), without_text, self.hidden)
        pooled = replaced(batch["text_pooled"].float(), without_text, self.pooled)
        without_picture = draws.chosen(self.data.image_embedding_dropout)
        nothing = torch.zeros(1, 1, self.image_width)
        if self.reads_pictures and "image_embedding" in batch:
            picture = replaced(batch["image_embedding"].float(), without_picture, nothing)
        else:
            picture = nothing.expand(len(text), 1, -1).to(text.device)
        return text, pooled, picture

    def loss(self, predict: Predictor, latent: Tensor, draws: Draws, sample_weight: Tensor | None = None) -> StepResult:
        """The loss on clean Stage C latents ``[B, 16, h, w]``; see `DiffusionLoss`."""
        noise = offset_noise(latent.shape[1:], draws, self.offset)
        return self.diffusion(predict, latent.float(), noise, draws, sample_weight)


def empty_prompt(text_encoder) -> TextCondition:
    """The empty prompt, from a StageHandle of a text encoder."""
    from ..stages import encode_text

    return encode_text(text_encoder, "")
