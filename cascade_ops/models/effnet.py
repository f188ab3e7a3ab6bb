"""EfficientNetV2-S, the picture encoder behind Stage C's latents and behind two of the ControlNets.

Architecture: Tan and Le, "EfficientNetV2: Smaller Models and Faster Training" (2021); tensor names as in the release.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Width and depth of the six block groups, stem first and head last, as published.
WIDTHS = (24, 24, 48, 64, 128, 160, 256, 1280)
DEPTHS = (2, 4, 4, 6, 9, 15)
_EXPANSION = (1, 4, 4, 4, 6, 6)
_STRIDE = (1, 2, 2, 2, 1, 2)
_FUSED = (True, True, True, False, False, False)
_BATCH_NORM_EPS = 1e-3

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_imagenet(image: Tensor) -> Tensor:
    """Normalise ``[B, 3, H, W]`` pictures in 0..1 with ImageNet's mean and deviation."""
    mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm and, if ``act``, SiLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out, eps=_BATCH_NORM_EPS),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if act else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Scale the channels by a gate read from their means."""

    def __init__(self, c: int, c_squeeze: int):
        super().__init__()
        self.fc1 = nn.Conv2d(c, c_squeeze, 1)
        self.fc2 = nn.Conv2d(c_squeeze, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = nn.functional.silu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(gate))


class InvertedBottleneck(nn.Module):
    """Expand, mix in space, project; with a residual where size and width stay.

    ``fused`` expands and mixes in one dense convolution; otherwise a depthwise one with squeeze and excitation.
    """

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int, fused: bool):
        super().__init__()
        c = c_in * expansion
        if fused and expansion == 1:
            layers = [conv_norm(c_in, c_out, 3, stride)]
        elif fused:
            layers = [conv_norm(c_in, c, 3, stride), conv_norm(c, c_out, 1, act=False)]
        else:
            layers = [
                conv_norm(c_in, c, 1),
                conv_norm(c, c, 3, stride, groups=c),
                SqueezeExcitation(c, max(1, c_in // 4)),
                conv_norm(c, c_out, 1, act=False),
            ]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


def efficientnet_features(
    c_in: int = 3, widths: Sequence[int] = WIDTHS, depths: Sequence[int] = DEPTHS
) -> nn.Sequential:
    """The feature layers, ``[B, c_in, H, W]`` to ``[B, widths[-1], H / 32, W / 32]`` (rounded up).

    Args:
        c_in: channels of the picture.
        widths: stem, six block groups, head.
        depths: blocks in each group.
    """
    if len(widths) != 8 or len(depths) != 6:
        raise ValueError(
            f"{len(widths)} widths and {len(depths)} depths were given; EfficientNetV2-S has 8 widths and 6 depths."
        )
    stages: list[nn.Module] = [conv_norm(c_in, widths[0], 3, 2)]
    for i, depth in enumerate(depths):
        stages.append(
            nn.Sequential(
                *(
                    InvertedBottleneck(
                        widths[i] if j == 0 else widths[i + 1],
                        widths[i + 1],
                        _EXPANSION[i],
                        _STRIDE[i] if j == 0 else 1,
                        _FUSED[i],
                    )
                    for j in range(depth)
                )
            )
        )
    stages.append(conv_norm(widths[6], widths[7], 1))
    return nn.Sequential(*stages)


class LatentEncoder(nn.Module):
    """Encode pictures to Stage C latents; the defaults are the published encoder.

    Args:
        c_latent: channels of the latent.
        widths, depths: see ``efficientnet_features``.
    """

    def __init__(self, c_latent: int = 16, widths: Sequence[int] = WIDTHS, depths: Sequence[int] = DEPTHS):
        super().__init__()
        self.backbone = efficientnet_features(3, widths, depths)
        self.mapper = nn.Sequential(
            nn.Conv2d(widths[-1], c_latent, 1, bias=False), nn.BatchNorm2d(c_latent, affine=False)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Encode ``[B, 3, H, W]`` (``normalize_imagenet`` applied) to ``[B, c_latent, H / 32, W / 32]``, rounded up."""
        return self.mapper(self.backbone(image.contiguous(memory_format=torch.channels_last)))
