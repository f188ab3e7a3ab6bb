"""Where the picture encoder inside a ControlNet starts from when it is trained.

The reference starts from a network that was trained on ImageNet. Here it starts from Stage C's latent encoder, which is
the same network, knows the family's pictures, and is there anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import ControlNet, LatentEncoder
from ..models.effnet import IMAGENET_MEAN, IMAGENET_STD
from .canny import canny_control
from .inpainting import inpainting_control

_STEM = "0.0.weight"
_STEM_MEAN = "0.1.running_mean"


@torch.no_grad()
def start_from_encoder(controlnet: ControlNet, encoder: LatentEncoder) -> list[str]:
    """Copy the encoder's layers into an ``effnet`` bottleneck wherever shapes fit; the names of tensors that did not.

    The encoder reads pictures with ImageNet's mean and deviation taken out, the ControlNet 0..1: the first layer and
    its batch norm are rescaled so that both see the same. One channel counts as a grey picture; of four, the last, the
    mask, counts nothing at first.
    """
    theirs = {name: value.detach().float().clone() for name, value in encoder.backbone.state_dict().items()}
    ours = controlnet.backbone.state_dict()
    deviation = torch.tensor(IMAGENET_STD, device=theirs[_STEM].device).view(1, 3, 1, 1)
    mean = torch.tensor(IMAGENET_MEAN, device=theirs[_STEM].device).view(1, 3, 1, 1)
    stem = theirs[_STEM] / deviation
    theirs[_STEM_MEAN] += (stem * mean).sum(dim=(1, 2, 3))
    channels = ours[_STEM].shape[1]
    if channels == 1:
        stem = stem.sum(dim=1, keepdim=True)
    elif channels > 3:
        stem = F.pad(stem, (0, 0, 0, 0, 0, channels - 3))
    theirs[_STEM] = stem
    fitting = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    controlnet.backbone.load_state_dict(fitting, strict=False)
    return [name for name in ours if name not in fitting]


@torch.no_grad()
def calibrate_batch_norms(controlnet: ControlNet, side: int = 128, pictures: int = 16) -> None:
    """Set the batch norms' statistics of a new ``effnet`` bottleneck, which are not learned afterwards.

    What they should be is measured on controls of mosaics of random colours, the same ones every time. Without it the
    signal of a new network fades within its forty layers.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.cat(
        [
            F.interpolate(torch.rand(pictures // 2, 3, squares, squares, generator=generator), size=(side, side))
            for squares in (3, 7)
        ]
    )
    channels = controlnet.backbone.state_dict()[_STEM].shape[1]
    makers: dict[int, Callable[[], Tensor]] = {
        1: lambda: canny_control(image),
        4: lambda: inpainting_control(image, image[:, :1]),
    }
    control = makers.get(channels, lambda: torch.rand(pictures, channels, side, side, generator=generator))()
    norms = [module for module in controlnet.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the plain mean over what it sees
    controlnet.backbone(control.to(next(controlnet.parameters()).device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
