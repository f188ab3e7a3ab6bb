"""The matrix products of a layer, by the quickest way that the device has for them."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# PyTorch gives a convolution of fewer numbers than this to a slow way of its own.
_FEWEST_NUMBERS = 20_481
# oneDNN puts the weight in order at every call, which fewer rows than these do not repay.
_FEWEST_ROWS = 128
# Bytes of a weight that is put in order and read at once; larger ones leave the caches in between.
_WEIGHT_AT_ONCE = 24 << 20
# Outputs that oneDNN computes together.
_FULL_VECTORS = 64


def at_hand(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer or convolution; None where only a call of the layer gives its result.

    That is so for weights in other forms and for the layers of a host, which fetch theirs when they are called. A
    host's layer that can have them ready has an attribute `at_hand`, a function that answers in the same way.
    """
    if type(layer) in (nn.Linear, nn.Conv2d):
        return layer.weight, layer.bias
    answer = getattr(layer, "at_hand", None)
    return None if answer is None else answer()


def linear(layer: nn.Module, x: Tensor, memory: Callable[[], Tensor] | None = None) -> Tensor:
    """What a linear layer gives for ``[..., C_in]``. memory: see `dense`."""
    weights = at_hand(layer)
    return layer(x) if weights is None else dense(x, *weights, memory=memory)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, memory: Callable[[], Tensor] | None = None) -> Tensor:
    """`F.linear`: ``[..., C_in]`` by a weight ``[C_out, C_in]``.

    In float32 on a CPU with several threads, oneDNN's 1x1 convolution divides the work better than the matrix product
    of PyTorch's BLAS does, of a large weight a part of the outputs at a time: see `docs/performance.md`.

    memory: gives a tensor ``[..., C_out]`` that a result made in parts may be written to.
    """
    if not _convolution_pays(x):
        return F.linear(x, weight, bias)
    outputs, parts = weight.shape[0], math.ceil(weight.numel() * weight.element_size() / _WEIGHT_AT_ONCE)
    if parts == 1:
        return _convolution(x, weight, bias)
    product = x.new_empty(*x.shape[:-1], outputs) if memory is None else memory()
    size = _FULL_VECTORS * math.ceil(outputs / parts / _FULL_VECTORS)
    for start in range(0, outputs, size):
        part = slice(start, start + size)
        product[..., part] = _convolution(x, weight[part], None if bias is None else bias[part])
    return product


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    row = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    product = F.conv2d(row, weight.view(*weight.shape, 1, 1), bias)
    return product.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _convolution_pays(x: Tensor) -> bool:
    return (
        # How many threads there are is nothing that a compiler can follow.
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= max(_FEWEST_NUMBERS, _FEWEST_ROWS * x.shape[-1])
        and _ONE_DNN
        and torch.get_num_threads() > 1
        and not torch.is_grad_enabled()
    )


_ONE_DNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
