"""A CLIP text tower from scratch or fine-tuned, from captions and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...checkpoints import load, save
from ...text_model import TOKEN_ROWS, TOKEN_TABLE
from ...tokenizer import END_TOKEN, START_TOKEN, VOCABULARY_SIZE
from ..clip import AttributeHeads, caption_tokens, collate, mean_state, scale_penalty
from ..draws import Draws
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings

_SPECIAL = {"bos_token_id": START_TOKEN, "eos_token_id": END_TOKEN, "pad_token_id": END_TOKEN}


class TextEncoderObjective(Objective):
    """The text tower with the heads that read it; only the tower is written.

    `encoders.attributes` are read from the projected pooled state, `encoders.token_attributes` (what a caption says in
    the order in which it says it) from the mean token state and from the state behind the end token: that is all that
    Stages B and C see. The file holds only the rows of the token table that captions used.
    """

    needs = frozenset({"caption", "attributes"})

    def __init__(self, module: nn.Module, settings: Settings, config: dict[str, Any], used: Tensor):
        super().__init__()
        width, projection = module.config.hidden_size, module.config.projection_dim
        encoders = settings.encoders
        self.module, self.settings, self.config = module, settings, config
        self.pooled_heads = AttributeHeads(projection, encoders.attributes)
        self.mean_heads = AttributeHeads(width, encoders.token_attributes)
        self.end_heads = AttributeHeads(width, encoders.token_attributes)
        self.register_buffer("used", used)

    def read(self, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, T] -> pooled [B, projection] and token states [B, T, width].

        The last column of every row must hold the end token or padding, which is the end token again: it shares the
        end token's task, so that states past the end, which Stage C attends to as well, mean something.
        """
        output = self.module(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        return output.text_embeds.float(), output.hidden_states[-1].float()

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        ids, mask, positions = collate([caption_tokens(caption) for caption in batch["caption"]], draws)
        self.used[ids.flatten().to(self.used.device)] = True
        device = self.module.text_projection.weight.device
        ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
        pooled, states = self.read(ids, mask, positions)
        targets, end = batch["attributes"], states[:, -1]
        heads = self.pooled_heads.loss(pooled, targets)
        heads = heads + self.mean_heads.loss(mean_state(states, mask), targets) + self.end_heads.loss(end, targets)
        used = torch.cat([states[mask.bool()], end])
        loss = heads + 0.05 * scale_penalty(used) + 0.01 * scale_penalty(pooled)
        figures = {
            "pooled": self.pooled_heads.accuracy(pooled, targets)["all"],
            "tokens": self.end_heads.accuracy(end, targets)["all"],
        }
        return StepResult(loss, figures=figures)

    def export(self, folder: Path, name: str) -> list[Path]:
        tensors = {key: value.detach() for key, value in self.module.state_dict().items()}
        rows = self.used.nonzero().flatten()
        if len(rows) < len(self.used):
            tensors[TOKEN_TABLE] = tensors[TOKEN_TABLE][rows.to(tensors[TOKEN_TABLE].device)]
            tensors[TOKEN_ROWS] = rows
        path = folder / f"{name}.safetensors"
        return [save(tensors, path, stage="text_encoder", config=self.config, name=self.settings.name or None)]


def build(settings: Settings, parts: Parts) -> TextEncoderObjective:
    """From `models.init`, or new with `network`, which has the arguments of transformers' ``CLIPTextConfig``.

    Raises:
        ValueError: the settings name no attributes, without which a text tower alone has nothing to learn from.
    """
    encoders = settings.encoders
    if not encoders.attributes or not encoders.token_attributes:
        raise ValueError(
            "encoders.attributes or encoders.token_attributes is empty, expected the number of classes of each: a text "
            "encoder learns to tell what the data's attributes say, name both."
        )
    torch.manual_seed(settings.seed)
    if settings.models.init != "none":
        path = Path(settings.models.init)
        encoder, info = load(path, "text_encoder", dtype=torch.float32)
        module = encoder.module.train().requires_grad_(True)
        return TextEncoderObjective(module, settings, dict(info.config), _stored_rows(info.path))
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = {"vocab_size": VOCABULARY_SIZE, **_SPECIAL, **settings.network}
    module = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    nn.init.normal_(module.text_model.embeddings.token_embedding.weight, std=0.3)
    nn.init.normal_(module.text_model.embeddings.position_embedding.weight, std=0.1)
    used = torch.zeros(VOCABULARY_SIZE, dtype=torch.bool)
    used[[START_TOKEN, END_TOKEN]] = True
    return TextEncoderObjective(module.train(), settings, config, used)


def _stored_rows(path: Path) -> Tensor:
    """Which rows of the token table a file has, bool ``[49408]``."""
    with safe_open(str(path), "pt") as file:
        if TOKEN_ROWS not in file.keys():  # noqa: SIM118 - not a mapping
            return torch.ones(VOCABULARY_SIZE, dtype=torch.bool)
        used = torch.zeros(VOCABULARY_SIZE, dtype=torch.bool)
        used[file.get_tensor(TOKEN_ROWS).long()] = True
    return used
