"""Train a small pair of CLIP towers: the text tower by what it must make readable, the image tower against it.

A text encoder for Stage C is read in two places: the token states before the last normalisation (cross-attention) and
the projected pooled state. The text objective therefore asks linear heads to read every attribute of a caption from
both, so that nothing a caption says is lost on the way; the token states are kept at zero mean and unit variance. The
image tower then learns the contrastive objective of Radford et al. 2021 (arXiv:2103.00020, figure 3) against the
frozen text tower, helped by the same kind of heads.

Nothing here knows what the attributes are: a target is a dict from an attribute's name to class indices [B].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Targets = dict[str, Tensor]


class AttributeHeads(nn.Module):
    """One linear classifier per attribute on the same features.

    `classes` maps the name of an attribute to its number of classes; one matrix product serves all of them.
    """

    def __init__(self, width: int, classes: dict[str, int]):
        super().__init__()
        self.classes = dict(classes)
        self.linear = nn.Linear(width, sum(classes.values()))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Features [B, width] -> logits [B, classes] by attribute."""
        parts = self.linear(features).split(list(self.classes.values()), dim=-1)
        return dict(zip(self.classes, parts, strict=True))

    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        """The mean cross-entropy over the attributes."""
        logits = self(features)
        return torch.stack([F.cross_entropy(logits[name], targets[name]) for name in self.classes]).mean()

    @torch.no_grad()
    def accuracy(self, features: Tensor, targets: Targets) -> dict[str, float]:
        """The share of right answers by attribute, and under `all` the share of samples with every answer right."""
        right = {name: logits.argmax(-1) == targets[name] for name, logits in self(features).items()}
        right["all"] = torch.stack(list(right.values())).all(dim=0)
        return {name: float(values.float().mean()) for name, values in right.items()}


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """The symmetric InfoNCE loss of CLIP: row i of both [B, width] belongs together; `logit_scale` is a logarithm."""
    logits = logit_scale.clamp(max=math.log(100)).exp() * normalised(image_embeds) @ normalised(text_embeds).T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def retrieval_at_1(image_embeds: Tensor, text_embeds: Tensor, group: int = 256) -> float:
    """The share of captions [N, width] whose own image [N, width] is the nearest among the `group` of their chunk."""
    hits = total = 0
    for images, texts in zip(image_embeds.split(group), text_embeds.split(group), strict=True):
        if len(images) == group:
            nearest = (normalised(texts) @ normalised(images).T).argmax(dim=1)
            hits += int((nearest == torch.arange(group, device=nearest.device)).sum())
            total += group
    if not total:
        raise ValueError(f"retrieval was given {len(image_embeds)} pairs, expected at least {group}: pass more pairs.")
    return hits / total


def normalised(embeds: Tensor) -> Tensor:
    return F.normalize(embeds, dim=-1)


def scale_penalty(states: Tensor) -> Tensor:
    """How far the channels of states [N, width] are from zero mean and unit variance over N."""
    return states.mean(dim=0).square().mean() + (states.var(dim=0) - 1).square().mean()


class TextObjective(nn.Module):
    """The text tower with the heads that read it; only `model` is kept after training.

    `order_free` classes are read from the projected pooled state, `in_order` classes (attributes in the order of
    mention) from the mean token state and from the states at and after the end token.
    """

    def __init__(self, model: nn.Module, order_free: dict[str, int], in_order: dict[str, int]):
        super().__init__()
        width, projection = model.config.hidden_size, model.config.projection_dim
        self.model = model
        self.pooled_heads = AttributeHeads(projection, order_free)
        self.mean_heads = AttributeHeads(width, in_order)
        self.end_heads = AttributeHeads(width, in_order)

    def read(self, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, T] -> pooled [B, projection] and token states [B, T, width].

        The last column of every row must hold the end token or padding, which is the end token again: it shares the
        end token's task, so that states past the end, which Stage C attends to as well, mean something.
        """
        output = self.model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        return output.text_embeds, output.hidden_states[-1]

    def loss(self, ids: Tensor, mask: Tensor, positions: Tensor | None, order_free: Targets, in_order: Targets):
        """Tokens as for `read`, class indices [B] by attribute -> scalar."""
        pooled, states = self.read(ids, mask, positions)
        used = torch.cat([states[mask.bool()], states[:, -1]])
        heads = self.pooled_heads.loss(pooled, order_free)
        heads = heads + self.mean_heads.loss(mean_state(states, mask), in_order)
        heads = heads + self.end_heads.loss(states[:, -1], in_order)
        return heads + 0.05 * scale_penalty(used) + 0.01 * scale_penalty(pooled)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """The mean [B, width] of the states [B, T, width] that the mask [B, T] keeps."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


class ImageObjective(nn.Module):
    """The image tower, the projection of text embeddings into its space, and heads that read its embedding."""

    def __init__(self, model: nn.Module, text_width: int, classes: dict[str, int]):
        super().__init__()
        width = model.config.projection_dim
        self.model = model
        self.text_to_image_projection = nn.Linear(text_width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.heads = AttributeHeads(width, classes)

    def loss(self, pixels: Tensor, text_embeds: Tensor, targets: Targets) -> Tensor:
        """Normalised pixels [B, 3, H, W], text embeddings [B, text_width] and attributes -> scalar."""
        embeds = self.model(pixels).image_embeds
        contrast = contrastive_loss(embeds, self.text_to_image_projection(text_embeds), self.logit_scale)
        return contrast + self.heads.loss(embeds, targets) + 0.01 * scale_penalty(embeds)
