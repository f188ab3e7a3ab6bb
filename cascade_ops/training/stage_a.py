"""The loss of Stage A, a plain autoencoder with a little latent noise, and the fits that come after training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import StageA

# The root of the published scale factor: the latent before the division has this deviation, after it 1.
LATENT_STD = 0.43

# Pictures that are encoded at once while fitting.
_CHUNK = 16


def autoencoder_loss(model: StageA, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Squared and absolute error of the reconstruction, and its peak signal-to-noise ratio in dB.

    The batch norm before the latent stays in evaluation mode, as a fixed scale: with the statistics of a batch of flat
    pictures the absolute colour is lost.

    Args:
        image: ``[B, 3, H, W]``, 0..1.
        noise: added to the latent, ``[B, c_latent, H / 4, W / 4]``.
    """
    model.eval()
    decoded = model.decode(model.encode(image)[0] + noise).float()
    square = F.mse_loss(decoded, image)
    return 10 * square + F.l1_loss(decoded, image), -10 * square.detach().clamp(min=1e-9).log10()


def raw_latents(model: StageA, images: Tensor) -> Tensor:
    """Latents of ``images [N, 3, H, W]`` before the division by the scale factor."""
    return torch.cat([model.encode(part)[0] for part in images.split(_CHUNK)]) * model.scale_factor


@torch.no_grad()
def normalize_latent(model: StageA, images: Tensor) -> None:
    """Give the latents of ``images [N, 3, H, W]`` mean 0 and deviation 1 per channel, without changing the pictures.

    The batch norm takes the new scale; the decoder's first convolution takes its inverse.
    """
    norm: nn.BatchNorm2d = model.down_blocks[-1][1]
    first: nn.Conv2d = model.up_blocks[0][0]
    latent = raw_latents(model, images)
    mean, std = latent.mean(dim=(0, 2, 3)), latent.std(dim=(0, 2, 3))
    gain = LATENT_STD / std
    norm.weight.mul_(gain)
    norm.bias.copy_((norm.bias - mean) * gain)
    weight = first.weight.clone()
    first.bias.add_((weight.flatten(1) * mean).sum(dim=1))
    first.weight.copy_(weight / gain.view(1, -1, 1, 1))


@torch.no_grad()
def fit_codebook(model: StageA, images: Tensor, generator: torch.Generator, rounds: int = 20) -> None:
    """Fit the codebook to the latents of ``images`` by k-means (Lloyd 1982); entries without members are redrawn."""
    points = raw_latents(model, images).permute(0, 2, 3, 1).flatten(0, 2)
    codebook = model.vquantizer.codebook.weight
    size = len(codebook)
    points = points[torch.randperm(len(points), generator=generator)[: 100 * size]]
    if len(points) < size:  # few pictures: some entries start at the same point
        points = points.repeat(-(-size // len(points)), 1)
    centres = points[torch.randperm(len(points), generator=generator)[:size]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = sums / counts.clamp(min=1)[:, None]
        empty = counts == 0
        centres[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
    codebook.copy_(centres)
