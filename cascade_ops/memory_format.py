"""The order in memory in which a GPU's convolutions want their weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def channels_last_convolutions(module: Module) -> Module:
    """Put the weights of a module's convolutions channels-last, in place, and give the module back.

    The networks' activations are channels-last, and cuDNN then reads weights in that order: weights in another one are
    rearranged at each call. Values, names and shapes stay. Weights of one channel or of one tap, such as those of
    depthwise and 1x1 convolutions, lie in both orders at once and are not touched.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = layer.weight
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return module
