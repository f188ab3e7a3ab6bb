"""ControlNet for Stage C: a picture becomes residuals for some of Stage C's residual blocks.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models" (2023), reduced in the release to an
encoder and 1x1 projections. Three bottlenecks are published: ``effnet`` (canny, inpainting), ``large``
(super-resolution) and ``simple`` (face identity).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .effnet import DEPTHS, WIDTHS, efficientnet_features
from .layers import ResBlock, as_channels_last, as_image
from .unet import CascadeUNet

# Residual blocks of the 3.6B Stage C that the published canny, inpainting and super-resolution files steer.
PUBLISHED_PROJ_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)
# Widths of the published ``large`` bottleneck: of the first layer, of the blocks, of what comes out.
LARGE_WIDTHS = (16384, 1024, 1280)
LARGE_BLOCKS = 8
_LEAK = 0.2


def default_proj_blocks(residual_blocks: int) -> tuple[int, ...]:
    """Which blocks to steer in a Stage C with so many residual blocks: up to four from each end, evenly spaced.

    64 gives the published choice.
    """
    step = max(1, residual_blocks // 16)
    first = [index * step for index in range(4) if index * step < residual_blocks]
    return tuple(sorted({*first, *(residual_blocks - 1 - index for index in first)}))


def residual_blocks(stage_c: CascadeUNet) -> int:
    """How many residuals a pass through Stage C can take: its residual blocks, repeats counted."""
    levels = [*zip(stage_c.down_blocks, stage_c.down_repeat_mappers, strict=True)]
    levels += zip(stage_c.up_blocks, stage_c.up_repeat_mappers, strict=True)
    return sum((1 + len(mappers)) * sum(isinstance(block, ResBlock) for block in blocks) for blocks, mappers in levels)


class AffineNorm(nn.LayerNorm):
    """Layer norm over the channels of ``[B, C, H, W]``, with learned scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        return as_image(super().forward(as_channels_last(x)))


class ConvBlock(nn.Module):
    """Two rounds of norm, GELU and 3x3 convolution, with a residual."""

    def __init__(self, c: int):
        super().__init__()
        self.blocks = nn.Sequential(
            AffineNorm(c), nn.GELU(), nn.Conv2d(c, c, 3, padding=1),
            AffineNorm(c), nn.GELU(), nn.Conv2d(c, c, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


class ControlNet(nn.Module):
    """Encode a control picture to residuals; the defaults are the published canny and inpainting networks.

    Args:
        c_in: channels of the control: 1 canny, 4 inpainting, 16 super-resolution (a Stage C latent), 512 identity.
        c_proj: width of Stage C.
        proj_blocks: which of Stage C's residual blocks get a residual, counted in the order in which they run.
        bottleneck_mode: ``effnet`` (or None), ``large`` or ``simple``.
        widths, depths: of the ``effnet`` bottleneck.
        large_widths, large_blocks: of the ``large`` one: first layer, blocks and output; how many blocks.
    """

    def __init__(
        self,
        c_in: int = 3,
        c_proj: int = 2048,
        proj_blocks: Sequence[int] = PUBLISHED_PROJ_BLOCKS,
        bottleneck_mode: str | None = None,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        large_widths: Sequence[int] = LARGE_WIDTHS,
        large_blocks: int = LARGE_BLOCKS,
    ):
        super().__init__()
        if not proj_blocks or sorted(set(proj_blocks)) != list(proj_blocks) or proj_blocks[0] < 0:
            raise ValueError(
                f"proj_blocks is {list(proj_blocks)}, expected at least one number, rising from 0: list the blocks to "
                "steer in the order in which they run."
            )
        if len(large_widths) != 3 or min(large_widths) < 1 or large_blocks < 0:
            raise ValueError(
                f"large_widths is {list(large_widths)} with {large_blocks} blocks, expected three widths (first layer, "
                "blocks, output) and 0 blocks or more: correct them."
            )
        self.proj_blocks = list(proj_blocks)
        self.bottleneck_mode = bottleneck_mode or "effnet"
        if self.bottleneck_mode == "effnet":
            self.backbone = efficientnet_features(c_in, widths, depths)
            if c_in != 3:
                # The release replaced the stem of a trained RGB network by one without padding.
                self.backbone[0][0] = nn.Conv2d(c_in, widths[0], 3, stride=2, bias=False)
            c = widths[-1]
        elif self.bottleneck_mode == "simple":
            self.backbone = nn.Sequential(
                nn.Conv2d(c_in, c_in * 4, 3, padding=1), nn.LeakyReLU(_LEAK), nn.Conv2d(c_in * 4, c_in, 3, padding=1)
            )
            c = c_in
        elif self.bottleneck_mode == "large":
            c_first, c_block, c = large_widths
            self.backbone = nn.Sequential(
                nn.Conv2d(c_in, c_first, 1),
                nn.LeakyReLU(_LEAK),
                nn.Conv2d(c_first, c_block, 1),
                *(ConvBlock(c_block) for _ in range(large_blocks)),
                nn.Conv2d(c_block, c, 1),
            )
        else:
            raise ValueError(f"The bottleneck {bottleneck_mode!r} was given; the kinds are effnet, large and simple.")
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.LeakyReLU(_LEAK), nn.Conv2d(c, c_proj, 1, bias=False))
            for _ in self.proj_blocks
        )
        for projection in self.projections:
            nn.init.zeros_(projection[-1].weight)

    def forward(self, control: Tensor) -> list[Tensor | None]:
        """Encode a control ``[B, c_in, H, W]`` (pictures 0..1, not normalised).

        Returns:
            One entry per residual block up to the last steered one: ``[B, c_proj, h, w]``, or None where there is no
            projection. ``h, w`` are a 32nd of the control's size for ``effnet``, else its size.
        """
        features = self.backbone(control)
        residuals: list[Tensor | None] = [None] * (max(self.proj_blocks) + 1)
        for block, projection in zip(self.proj_blocks, self.projections, strict=True):
            hidden = F.leaky_relu(projection[0](features), _LEAK)
            residuals[block] = projection[2](hidden)
        return residuals
