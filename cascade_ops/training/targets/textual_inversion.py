"""Textual inversion: tokens learn to mean what the pictures show, everything else stays as it is.

Source: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion" (2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapters.dialects import read_tokens
from ...adapters.tokens import write_embedding
from ...handles import StageHandle
from ...models import StageC
from ..draws import Draws
from ..lora_layers import private_copy
from ..memory_saving import checkpoint_blocks
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings
from ..stage_c_loss import StageCLoss, empty_prompt
from ..stage_c_samples import StageCSampler
from ..tokens import TrainedTokens


class TokensObjective(Objective):
    """The diffusion loss of a frozen Stage C whose prompts have tokens that learn; base of the LoRA training.

    handle: a Stage C of any float dtype, which stays as it is. tokens: None where no token learns, and the captions may
    be encoded once and for all.
    """

    def __init__(
        self,
        settings: Settings,
        handle: StageHandle,
        text_encoder: StageHandle,
        tokens: TrainedTokens | None,
    ):
        super().__init__()
        self.settings, self.handle, self.plain_encoder = settings, handle, text_encoder
        module = private_copy(handle.expect("stage_c").module)
        assert isinstance(module, StageC)
        self.module, self.tokens = module, tokens
        self.loss = StageCLoss(settings, empty_prompt(text_encoder), module.clip_img_mapper.in_features)
        text = {"text", "text_pooled"} if tokens is None else {"caption"}
        pictures = {"image_embedding"} if self.loss.reads_pictures else set()
        self.needs = frozenset({"stage_c_latent"} | text | pictures)

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        figures = {}
        if self.tokens is not None:
            text = self.tokens.encode(batch["caption"])
            batch = {**batch, "text": text.hidden, "text_pooled": text.pooled[:, None]}
            figures["captions_with_token"] = self.tokens.share_named(batch["caption"])
        conditions = self.loss.conditions(batch, draws)
        result = self.loss.loss(
            lambda x, r: self.module(x, r, *conditions), batch["stage_c_latent"], draws, batch.get("loss_weight")
        )
        result.figures.update(figures)
        return result

    def sample(self, prompts: list[str], pictures: list[Tensor], seed: int, steps: int) -> Tensor:
        encoder = self.plain_encoder if self.tokens is None else self.tokens.text_encoder()
        defaults: dict[str, Any] = dict(self.handle.info.defaults)
        return StageCSampler(encoder, self.settings, defaults)(self.module, prompts, seed, steps)

    def export(self, folder: Path, name: str) -> list[Path]:
        """One file per token, ``embeddings/<token>.safetensors``; a prompt names it as ``embedding:<token>``."""
        tokens = () if self.tokens is None else self.tokens.learned()
        return [write_embedding(folder / "embeddings" / f"{token.name}.safetensors", token) for token in tokens]


def build(settings: Settings, parts: Parts) -> TokensObjective:
    """Tokens in front of Stage C; `models.init` is a file with tokens learned before, to go on with.

    Raises:
        ValueError: no tokens; see `TrainedTokens`.
    """
    if not settings.tokens:
        raise ValueError("Textual inversion was given no tokens, expected at least one to learn: set 'tokens'.")
    text_encoder = parts.load("text_encoder")
    start = () if settings.models.init == "none" else read_tokens(settings.models.init)
    tokens = TrainedTokens(text_encoder, settings.tokens, start)
    objective = TokensObjective(settings, parts.load("stage_c"), text_encoder, tokens)
    checkpoint_blocks(objective.module, settings.gradient_checkpointing)
    return objective
