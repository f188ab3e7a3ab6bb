"""Training the latent encoder and the previewer together.

A pixel loss alone gives blobs at 42-fold compression: small shapes weigh little in the mean. So the latent is also
asked, cell by cell and through a linear map, what it covers, and a decoder that is thrown away afterwards has to draw
the picture and the map of what is where.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import LatentEncoder, Previewer
from ..models.effnet import normalize_imagenet


@dataclass(frozen=True)
class LatentBatch:
    """Pictures and what is in them.

    Attributes:
        image: ``[B, 3, H, W]``, 0..1, H and W multiples of 32.
        labels: class maps ``[B, K, H / 4, W / 4]`` int64, one per attribute; 0 is background.
        noise: added to the latent, ``[B, c_latent, H / 32, W / 32]``.
    """

    image: Tensor
    labels: Tensor
    noise: Tensor


class TrainingDecoder(nn.Module):
    """Latent to picture and class maps at 16 pixels per cell; exists only while the encoder trains."""

    def __init__(self, c_latent: int, c: int, classes: list[int]):
        super().__init__()
        self.classes = classes

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
        self.maps = nn.Conv2d(c // 2, sum(classes), 1)

    def forward(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``[B, c_latent, h, w]`` to a picture ``[B, 3, 16 h, 16 w]`` and logits ``[B, n, 8 h, 8 w]`` per map."""
        hidden = self.body(latent)
        return self.picture(hidden), list(self.maps(hidden).split(self.classes, dim=1))


class LatentEncoderObjective(nn.Module):
    """The encoder and the previewer with the heads that read the latent.

    Args:
        classes: number of classes per attribute, background included.
    """

    def __init__(self, encoder: LatentEncoder, previewer: Previewer, classes: list[int], c_decoder: int = 64):
        super().__init__()
        c_latent = encoder.mapper[0].out_channels
        self.encoder, self.previewer, self.classes = encoder, previewer, classes
        self.decoder = TrainingDecoder(c_latent, c_decoder, classes)
        self.cells = nn.Conv2d(c_latent, sum(classes), 1)

    def freeze_norms(self, frozen: bool) -> None:
        """Use the running statistics of the batch norms (``frozen``) or those of each batch."""
        self.train(not frozen)

    def loss(self, batch: LatentBatch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the previewer's, the decoder's and the cells' losses."""
        latent = self.encoder(normalize_imagenet(batch.image)) + batch.noise
        decoded, maps = self.decoder(latent)
        preview = self.previewer(latent)
        weight = 1 + 4 * (batch.labels[:, :1] > 0).float()
        pixels = weighted_pixel_loss(decoded, batch.image, weight) + weighted_pixel_loss(preview, batch.image, weight)
        size = maps[0].shape[-2:]
        labels = F.interpolate(batch.labels.float(), size=size, mode="nearest-exact").long()
        drawn = sum(F.cross_entropy(logits, labels[:, k]) for k, logits in enumerate(maps)) / len(maps)
        targets = cell_labels(batch.labels, latent.shape[-2:], self.classes)
        cells, right = latent.new_zeros(()), {}
        for k, logits in enumerate(self.cells(latent).split(self.classes, dim=1)):
            target = targets[:, k]
            cells = cells + F.cross_entropy(logits, target) / len(self.classes)
            hit = (logits.argmax(dim=1) == target)[target > 0]
            right[f"cell{k}"] = hit.float().mean().item() if len(hit) else 0.0
        figures = {"pixels": pixels.item(), "drawn": drawn.item(), **right}
        return pixels + 0.5 * drawn + 0.3 * cells, figures


def weighted_pixel_loss(picture: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Absolute and squared error at the size of ``picture``, each pixel weighted by ``weight [B, 1, h, w]``."""
    size = picture.shape[-2:]
    target = F.interpolate(image, size=size, mode="area")
    weight = F.interpolate(weight, size=size, mode="nearest-exact")
    error = picture - target
    return ((error.abs() + 2 * error.square()) * weight).mean() / weight.mean()


def cell_labels(labels: Tensor, size: tuple[int, int], classes: list[int]) -> Tensor:
    """What each latent cell covers: per attribute the most frequent foreground class, 0 if under an eighth is covered.

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
def refit_latent_norm(encoder: LatentEncoder, images: Tensor) -> None:
    """Set the statistics of the encoder's last batch norm to those of ``images [N, 3, H, W]`` (0..1)."""
    features = torch.cat([encoder.mapper[0](encoder.backbone(normalize_imagenet(part))) for part in images.split(32)])
    encoder.mapper[1].running_mean.copy_(features.mean(dim=(0, 2, 3)))
    encoder.mapper[1].running_var.copy_(features.var(dim=(0, 2, 3)))
