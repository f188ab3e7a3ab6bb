"""IP-Adapter on Stage C: pictures are read through keys and values of their own.

Stage C stays as it is; the adapter learns to help it predict the noise of latents of the very picture whose CLIP
embedding it is shown. Source: Ye et al., "IP-Adapter" (2023), section 3.2.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...checkpoints import load, save
from ...checkpoints.errors import shown
from ...denoisers import SteppedAdapter
from ...handles import StageHandle
from ...models import IPAdapter, StageC
from ...vision import encode_pictures
from ..diffusion_loss import replaced
from ..draws import Draws
from ..frozen import frozen_copy
from ..memory_saving import checkpoint_blocks
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings
from ..stage_c_loss import StageCLoss, empty_prompt
from ..stage_c_samples import StageCSampler


class IPAdapterObjective(Objective):
    """Trains an IP-Adapter through a frozen Stage C of any dtype, which is in evaluation mode, without dropout.

    The picture goes to the adapter alone; Stage C's own picture tokens are those of a zero embedding. For a share
    `picture_dropout` of the samples the adapter reads zeros, for a share `text_dropout` the caption is the empty
    prompt, and for a share `picture_dropout` both are: so it learns what "no picture" is, which guidance needs.

    image_encoder: for `sample`.
    """

    needs = frozenset({"stage_c_latent", "text", "text_pooled", "image_embedding"})

    def __init__(
        self,
        adapter: IPAdapter,
        stage_c: StageC,
        loss: StageCLoss,
        sampler: StageCSampler,
        image_encoder: StageHandle,
        config: dict,
        name: str | None = None,
        picture_dropout: float = 0.05,
        text_dropout: float = 0.05,
    ):
        super().__init__()
        if 2 * picture_dropout + text_dropout > 1:
            raise ValueError(
                f"The dropouts are {picture_dropout:g} (picture), {text_dropout:g} (text) and {picture_dropout:g} "
                "(both), expected at most 1 in all: lower ip_adapter.dropout or data.caption_dropout."
            )
        self.adapter, self.loss, self.sampler, self.image_encoder = adapter, loss, sampler, image_encoder
        self.config, self.name = config, name
        self.picture_dropout, self.text_dropout = picture_dropout, text_dropout
        # In a list: the frozen model is neither saved nor spread over devices with what is trained.
        self._frozen = [stage_c.eval()]

    @property
    def stage_c(self) -> StageC:
        """The frozen model."""
        return self._frozen[0]

    def conditions(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Text ``[B, 77, C]``, pooled text ``[B, 1, P]``, the adapter's picture ``[B, 1, E]``, with their dropouts."""
        draw = draws.uniform()
        picture_end = self.picture_dropout
        text_end = picture_end + self.text_dropout
        both_end = text_end + self.picture_dropout
        both = (draw >= text_end) & (draw < both_end)
        without_picture = (draw < picture_end) | both
        without_text = (draw >= picture_end) & (draw < both_end)
        text = replaced(batch["text"].float(), without_text, self.loss.hidden)
        pooled = replaced(batch["text_pooled"].float(), without_text, self.loss.pooled)
        picture = batch["image_embedding"].float()
        return text, pooled, replaced(picture, without_picture, torch.zeros_like(picture[:1]))

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        latent = batch["stage_c_latent"]
        self._move(latent.device)
        text, pooled, picture = self.conditions(batch, draws)
        nothing = text.new_zeros(len(text), 1, self.stage_c.clip_img_mapper.in_features)
        attention = self.adapter.attention(picture)
        return self.loss.loss(
            lambda x, r: self.stage_c(x, r, text, pooled, nothing, decoupled=[attention]),
            latent,
            draws,
            batch.get("loss_weight"),
        )

    def _move(self, device: torch.device) -> None:
        self._frozen = [self.stage_c.to(device)]

    def export(self, folder: Path, name: str) -> list[Path]:
        path = folder / f"{name}.safetensors"
        return [save(self.adapter, path, stage="ip_adapter", config=self.config, name=self.name)]

    @torch.no_grad()
    def sample(self, prompts: list[str], pictures: list[Tensor], seed: int, steps: int) -> Tensor | None:
        """Latents of `prompts` that read `pictures`, ``[3, H, W]`` 0..1, one for all or one each; None without any.

        Raises:
            ValueError: another number of pictures.
        """
        if not pictures:
            return None
        if len(pictures) not in (1, len(prompts)):
            raise ValueError(
                f"There are {len(pictures)} sample pictures for {len(prompts)} prompts, expected one for all or one "
                "each: change samples.pictures."
            )
        self._move(next(self.adapter.parameters()).device)
        embeddings = torch.cat([encode_pictures(self.image_encoder, picture[None]) for picture in pictures])
        adapters = [SteppedAdapter(self.adapter, embeddings)]
        return self.sampler(self.stage_c, prompts, seed, steps, adapters=adapters)


def build(settings: Settings, parts: Parts) -> IPAdapterObjective:
    """An IP-Adapter from `models.init`, or a new one for the Stage C and the image encoder of the run.

    Raises:
        ValueError: dropouts of more than 1 in all; a file for another Stage C, another image encoder or with another
            number of tokens.
    """
    handle, image_encoder = parts.load("stage_c"), parts.load("image_encoder")
    stage_c: StageC = frozen_copy(handle.module)
    checkpoint_blocks(stage_c, settings.gradient_checkpointing)
    config = IPAdapter.config_for(stage_c, image_encoder.info.config["projection_dim"], settings.ip_adapter.tokens)
    if settings.models.init == "none":
        torch.manual_seed(settings.seed)
        adapter = IPAdapter(**config)
    else:
        adapter = _from_file(settings, stage_c, config)
    text_encoder = parts.load("text_encoder")
    return IPAdapterObjective(
        adapter.train().requires_grad_(True),
        stage_c,
        StageCLoss(settings, empty_prompt(text_encoder), stage_c.clip_img_mapper.in_features),
        StageCSampler(text_encoder, settings, handle.info.defaults),
        image_encoder,
        config,
        # The name tells which family a file belongs to.
        handle.info.size if handle.family == "tiny" else settings.name or None,
        settings.ip_adapter.dropout,
        settings.data.caption_dropout,
    )


def _from_file(settings: Settings, stage_c: StageC, config: dict) -> IPAdapter:
    """The adapter to go on with, in float32."""
    adapter, info = load(Path(settings.models.init), "ip_adapter", dtype=torch.float32)
    file = shown(info.path)
    try:
        adapter.check(stage_c)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for argument, what, advice in (
        ("c_image", "reads image embeddings of {} numbers", "choose the image encoder that it was trained with"),
        ("tokens", "makes {} tokens of a picture", "set ip_adapter.tokens to that"),
        ("c_cond", "has tokens {} wide", "choose the Stage C that it was trained on"),
    ):
        if info.config[argument] != config[argument]:
            found = what.format(info.config[argument])
            raise ValueError(f"{file} {found}, expected {config[argument]}: {advice}.")
    return adapter
