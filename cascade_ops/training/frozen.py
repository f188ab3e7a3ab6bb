"""A model that only runs during a training, with gradients through it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """The module with its weights shared, on its own to be moved and to be run with gradients through it.

    Weights that a host has loaded in inference mode cannot be, and are copied.
    """
    with torch.inference_mode(False):
        shared: dict[int, object] = {}
        for parameter in module.parameters():
            values = parameter.clone() if parameter.is_inference() else parameter.detach()
            shared[id(parameter)] = nn.Parameter(values, requires_grad=False)
        for buffer in module.buffers():
            shared[id(buffer)] = buffer.clone() if buffer.is_inference() else buffer
        # deepcopy takes what the memo already holds instead of copying it.
        return copy.deepcopy(module, shared).eval()
