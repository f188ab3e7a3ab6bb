"""The previewer: a small convolutional decoder from Stage C's latent to pixels, 8 per latent cell."""

import torch
from torch import Tensor, nn


class Previewer(nn.Module):
    """Decode Stage C latents to small pictures; the defaults are the published previewer.

    Args:
        c_in: channels of the latent.
        c_hidden: width at the latent's resolution.
        c_out: channels of the picture.
    """

    def __init__(self, c_in: int = 16, c_hidden: int = 512, c_out: int = 3):
        super().__init__()

        def mix(c_from: int, c_to: int, kernel: int) -> list[nn.Module]:
            return [nn.Conv2d(c_from, c_to, kernel, padding=kernel // 2), nn.GELU(), nn.BatchNorm2d(c_to)]

        def double(c_from: int, c_to: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(c_from, c_to, 2, stride=2), nn.GELU(), nn.BatchNorm2d(c_to)]

        half, quarter = c_hidden // 2, c_hidden // 4
        self.blocks = nn.Sequential(
            *mix(c_in, c_hidden, 1),
            *mix(c_hidden, c_hidden, 3),
            *double(c_hidden, half),
            *mix(half, half, 3),
            *double(half, quarter),
            *mix(quarter, quarter, 3),
            *double(quarter, quarter),
            *mix(quarter, quarter, 3),
            nn.Conv2d(quarter, c_out, 1),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Decode ``[B, c_in, h, w]`` to ``[B, c_out, 8 h, 8 w]``, about 0..1 and not clamped."""
        return self.blocks(latent.contiguous(memory_format=torch.channels_last))
