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
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokenizer import END_TOKEN, SEQUENCE_LENGTH, START_TOKEN, default_tokenizer
from .draws import Draws

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
    def accuracy(self, features: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The share of right answers by attribute, and under `all` the share of samples with every answer right."""
        right = {name: logits.argmax(-1) == targets[name] for name, logits in self(features).items()}
        right["all"] = torch.stack(list(right.values())).all(dim=0)
        return {name: values.float().mean() for name, values in right.items()}


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


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """The mean [B, width] of the states [B, T, width] that the mask [B, T] keeps."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


@lru_cache(maxsize=200_000)
def caption_tokens(caption: str) -> tuple[int, ...]:
    """Start, the ids of a caption, end; at most 77, what is longer is cut as CLIP cuts it."""
    ids = default_tokenizer().encode(caption)[: SEQUENCE_LENGTH - 2]
    return START_TOKEN, *ids, END_TOKEN


def collate(rows: Sequence[Sequence[int]], draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of B captions -> ids, mask and position ids, all int64 [B, T].

    T is the longest caption and one more column: padding at a random position up to the full 77, which stands for all
    the padding of a full-length prompt. Attention is causal and masked, so the real tokens see no difference.
    """
    length = max(map(len, rows)) + 1
    ids = torch.full((len(rows), length), END_TOKEN)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    positions = torch.arange(length).repeat(len(rows), 1)
    # A caption of full length leaves no padding: its last column repeats the last position.
    first = torch.tensor([min(len(row), SEQUENCE_LENGTH - 1) for row in rows])
    positions[:, -1] = first + (draws.uniform() * (SEQUENCE_LENGTH - first)).long()
    return ids, mask, positions.clamp(max=SEQUENCE_LENGTH - 1)
