"""Losses that make the latent encoder keep what matters, and the fit that comes after training.

A pixel loss alone gives blobs at 42-fold compression: small shapes weigh little in the mean. So the latent is also
asked, cell by cell and through a linear map, what it covers, and a decoder that is thrown away afterwards has to draw
the picture and the map of what is where.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import LatentEncoder, Previewer
from ..models.effnet import normalize_imagenet

# Weight of the pixels that a map calls foreground.
_FOREGROUND = 5.0


class TrainingDecoder(nn.Module):
    """Latent to picture and class maps at 16 pixels per cell; exists only while the encoder trains."""

    def __init__(self, c_latent: int, c: int, classes: Sequence[int]):
        super().__init__()
        self.classes = list(classes)

        def mix(c_from: int, c_to: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_from, c_to, 3, padding=1), nn.GroupNorm(8, c_to), nn.SiLU())

        self.body = nn.Sequential(
            mix(c_latent, c),
            mix(c, c),
            mix(c, c),
            nn.ConvTranspose2d(c, c, 2, stride=2),
            mix(c, c),
            nn.ConvTranspose2d(c, c // 2, 2, stride=2),
            mix(c // 2, c // 2),
            nn.ConvTranspose2d(c // 2, c // 2, 2, stride=2),
            mix(c // 2, c // 2),
        )
        self.picture = nn.Sequential(nn.Conv2d(c // 2, 3 * 4, 3, padding=1), nn.PixelShuffle(2))
        self.maps = nn.Conv2d(c // 2, sum(classes), 1) if classes else None

    def forward(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``[B, c_latent, h, w]`` to a picture ``[B, 3, 16 h, 16 w]`` and logits ``[B, n, 8 h, 8 w]`` per map."""
        hidden = self.body(latent)
        maps = [] if self.maps is None else list(self.maps(hidden).split(self.classes, dim=1))
        return self.picture(hidden), maps


class LatentReaders(nn.Module):
    """What reads the latent while the encoder trains: the decoder, and a linear map of each cell.

    Args:
        classes: number of classes per map, background included; empty where there are no maps.
    """

    def __init__(self, c_latent: int, classes: Sequence[int] = (), c: int = 64):
        super().__init__()
        self.classes = list(classes)
        self.decoder = TrainingDecoder(c_latent, c, self.classes)
        self.cells = nn.Conv2d(c_latent, sum(self.classes), 1) if self.classes else None

    def loss(
        self, latent: Tensor, preview: Tensor, image: Tensor, maps: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """How badly pictures and maps are read from ``latent [B, C, h, w]``.

        Args:
            preview: the previewer's picture of it, ``[B, 3, 8 h, 8 w]``.
            image: the picture, 0..1, of any size.
            maps: class maps ``[B, K, m, n]`` int64, 0 is background; needed where the readers have classes.
        """
        size = [8 * side for side in latent.shape[-2:]]
        labels = None if maps is None else F.interpolate(maps.float(), size=size, mode="nearest-exact").long()
        weight = image.new_ones(len(image), 1, *size)
        if labels is not None:
            weight = 1 + (_FOREGROUND - 1) * (labels[:, :1] > 0).float()
        decoded, drawn = self.decoder(latent)
        pixels = weighted_pixel_loss(decoded, image, weight) + weighted_pixel_loss(preview, image, weight)
        figures = {"pixels": pixels.detach()}
        if self.cells is None:
            return pixels, figures
        map_loss = sum(F.cross_entropy(logits, labels[:, k]) for k, logits in enumerate(drawn)) / len(drawn)
        targets = cell_labels(labels, latent.shape[-2:], self.classes)
        logits = self.cells(latent).split(self.classes, dim=1)
        cell_loss = sum(F.cross_entropy(part, targets[:, k]) for k, part in enumerate(logits)) / len(logits)
        for k, part in enumerate(logits):
            covered = targets[:, k] > 0
            right = (part.argmax(dim=1) == targets[:, k]) & covered
            figures[f"cell{k}"] = right.sum() / covered.sum().clamp(min=1)
        return pixels + 0.5 * map_loss + 0.3 * cell_loss, {**figures, "drawn": map_loss.detach()}


def weighted_pixel_loss(picture: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Absolute and squared error at the size of ``picture``, each pixel weighted by ``weight [B, 1, h, w]``."""
    size = picture.shape[-2:]
    target = F.interpolate(image, size=size, mode="area")
    weight = F.interpolate(weight, size=size, mode="nearest-exact")
    error = picture - target
    return ((error.abs() + 2 * error.square()) * weight).mean() / weight.mean()


def cell_labels(labels: Tensor, size: Sequence[int], classes: Sequence[int]) -> Tensor:
    """What each latent cell covers: per map the most frequent foreground class, 0 if under an eighth is covered.

    Args:
        labels: ``[B, K, H, W]`` with H and W multiples of ``size``.

    Returns:
        ``[B, K, *size]`` int64.
    """
    batch, attributes, height, width = labels.shape
    blocks = labels.view(batch, attributes, size[0], height // size[0], size[1], width // size[1])
    blocks = blocks.permute(0, 1, 2, 4, 3, 5).flatten(4)
    counts = torch.stack(
        [F.one_hot(blocks[:, k], max(classes)).sum(dim=-2) for k in range(attributes)], dim=1
    )  # [B, K, h, w, classes]
    counts[..., 0] = blocks.shape[-1] // 8
    return counts.argmax(dim=-1)


@torch.no_grad()
def refit_latent_norm(encoder: LatentEncoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Set the statistics of the encoder's last batch norm to those of ``images [N, 3, H, W]`` (0..1).

    Returns:
        ``gain`` and ``shift [C]``: a latent as it was before is ``gain * latent + shift`` of the new one.
    """
    norm = encoder.mapper[1]
    mean, std = norm.running_mean.clone(), (norm.running_var + norm.eps).sqrt()
    features = torch.cat([encoder.mapper[0](encoder.backbone(normalize_imagenet(part))) for part in images.split(32)])
    norm.running_mean.copy_(features.mean(dim=(0, 2, 3)))
    norm.running_var.copy_(features.var(dim=(0, 2, 3)))
    return (norm.running_var + norm.eps).sqrt() / std, (norm.running_mean - mean) / std


@torch.no_grad()
def fold_latent(conv: nn.Conv2d, gain: Tensor, shift: Tensor) -> None:
    """Let a 1x1 convolution that read ``gain * latent + shift`` read the latent itself, with the same result."""
    conv.bias.add_(conv.weight.flatten(1) @ shift)
    conv.weight.mul_(gain.view(1, -1, 1, 1))


def previewer_input(previewer: Previewer) -> nn.Conv2d:
    """The previewer's first layer, which reads the latent."""
    return previewer.blocks[0]
