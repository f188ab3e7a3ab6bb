"""A CLIP image tower from scratch or fine-tuned, against a finished text tower."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ...checkpoints import load, save
from ...vision import CLIP_MEAN, CLIP_STD
from ..clip import AttributeHeads, contrastive_loss, scale_penalty
from ..draws import Draws
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings

PROJECTION = "text_to_image_projection.weight"

# Generated pictures are not as crisp as drawn ones or photographs: some training pictures are blurred, all are noised.
_BLURRED_SHARE = 0.25
_LARGEST_NOISE = 0.1


class ImageEncoderObjective(Objective):
    """The contrastive objective of CLIP against the frozen text tower, with heads for attributes where data has them.

    The projection of text embeddings into the space of picture embeddings is written with the tower, as
    ``text_to_image_projection.weight``: the two widths may differ.
    """

    def __init__(self, module: nn.Module, settings: Settings, config: dict[str, Any], text_width: int):
        super().__init__()
        width, attributes = module.config.projection_dim, settings.encoders.attributes
        self.module, self.settings, self.config = module, settings, config
        self.text_to_image_projection = nn.Linear(text_width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.heads = AttributeHeads(width, attributes) if attributes else None
        self.needs = frozenset({"image", "text_pooled"} | ({"attributes"} if attributes else set()))

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        pixels = degraded(clip_pixels(batch["image"], self.module.config.image_size), draws)
        embeds = self.module(pixels).image_embeds.float()
        texts = self.text_to_image_projection(batch["text_pooled"].float().flatten(1))
        contrast = contrastive_loss(embeds, texts, self.logit_scale)
        loss, figures = contrast + 0.01 * scale_penalty(embeds), {"contrast": contrast.detach()}
        if self.heads is not None:
            loss = loss + self.heads.loss(embeds, batch["attributes"])
            figures["attributes"] = self.heads.accuracy(embeds, batch["attributes"])["all"]
        return StepResult(loss, figures=figures)

    def export(self, folder: Path, name: str) -> list[Path]:
        tensors = {key: value.detach() for key, value in self.module.state_dict().items()}
        tensors[PROJECTION] = self.text_to_image_projection.weight.detach()
        path = folder / f"{name}.safetensors"
        return [save(tensors, path, stage="image_encoder", config=self.config, name=self.settings.name or None)]


def clip_pixels(image: Tensor, side: int) -> Tensor:
    """Pictures ``[B, 3, H, W]``, 0..1, as CLIP sees them: the centre square at `side` pixels, normalised.

    `vision.clip_pixels` does the same exactly as published, one picture after another in main memory.
    """
    height, width = image.shape[-2:]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    image = image[..., top : top + square, left : left + square]
    small = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (small.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (small - mean) / std


def degraded(pixels: Tensor, draws: Draws) -> Tensor:
    """A little noise on all, and a blur on some of ``[B, 3, H, W]``."""
    blurred = F.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
    pixels = torch.where(draws.chosen(_BLURRED_SHARE, 1, 1, 1).to(pixels.device), blurred, pixels)
    level = draws.uniform(1, 1, 1) * _LARGEST_NOISE
    return pixels + (level * draws.normal(*pixels.shape[1:])).to(pixels.device)


def build(settings: Settings, parts: Parts) -> ImageEncoderObjective:
    """From `models.init`, or new with `network`, which has the arguments of transformers' ``CLIPVisionConfig``."""
    text_width = parts.load("text_encoder").module.pooled_width
    torch.manual_seed(settings.seed)
    if settings.models.init != "none":
        module, info = load(Path(settings.models.init), "image_encoder", dtype=torch.float32)
        objective = ImageEncoderObjective(module.train().requires_grad_(True), settings, dict(info.config), text_width)
        with safe_open(str(info.path), "pt") as file:
            if PROJECTION in file.keys():  # noqa: SIM118 - not a mapping
                objective.text_to_image_projection.weight.data.copy_(file.get_tensor(PROJECTION).float())
        return objective
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    module = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings.network))
    return ImageEncoderObjective(module.train(), settings, dict(settings.network), text_width)
