"""Blocks that write over their input, in strips of rows: few passes over memory, and little of it.

On a CPU a large tensor that is new costs more than what is computed in it, since the system hands out its pages one by
one, and a pass over one that left the caches costs as much as the arithmetic of an activation. So the wide hidden
layer of a per-pixel MLP is made strip by strip, in memory that all blocks of a pass share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .dense import at_hand, dense, linear

# Bytes of what is made at once: what stays in a CPU's caches, and what a GPU is busy with for long enough.
_STRIP = 4 << 20
_LARGE_STRIP = 256 << 20
# Numbers that are all in the caches anyway.
_FEW = 1 << 20
# oneDNN puts a weight in order at every call, which fewer positions than these do not repay.
_FEWEST_POSITIONS = 1024
# A CPU's hidden layers up to this size come from memory that the allocator keeps.
_KEPT = 32 << 20


class Workspace:
    """Memory that the blocks of one pass share. A block that is given one may write its result over its input."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Uninitialised ``[rows, columns]``, valid until the next call."""
        key, size = (like.device, like.dtype), rows * columns
        if key not in self._memory or self._memory[key].numel() < size:
            self._memory.pop(key, None)
            self._memory[key] = like.new_empty(size)
        return self._memory[key][:size].view(rows, columns)


def strips(
    height: int, width: int, position_bytes: int, device: torch.device, *, least: int = 1, most: int = _STRIP
) -> Iterator[slice]:
    """Rows of a picture of `height` x `width` positions, each of so many bytes, that are worked on at once.

    least: rows. most: bytes of a strip on a CPU, as far as that leaves enough rows.
    """
    most = most if device.type == "cpu" else _LARGE_STRIP
    rows = max(least, math.ceil(_FEWEST_POSITIONS / width), most // (width * position_bytes))
    for start in range(0, height, rows):
        yield slice(start, min(height, start + rows))


def squares(x: Tensor) -> Tensor:
    """Sum over the rows of ``[N, C]`` of the squares, ``[C]`` float32."""
    x = x.float()
    return (x * x).sum(0)


def add_mlp(x: Tensor, mixed: Callable[..., Tensor], mlp: nn.Sequential, workspace: Workspace) -> Tensor:
    """Add a per-pixel MLP with global response norm to ``[B, H, W, C]``, which is written over.

    mixed: gives the MLP's input for some images and rows, without them for all. mlp: linear, GELU, response norm,
    dropout (not applied), linear.
    """
    first, _, norm, _, last = mlp
    height, width = x.shape[1:3]
    hidden_bytes = x.element_size() * last.in_features
    # A layer that has to be called makes its weights anew at each call.
    called = not norm.is_plain or at_hand(first) is None or at_hand(last) is None
    small = x.shape[0] * height * width * hidden_bytes <= _KEPT or height * width <= _FEWEST_POSITIONS
    if called or small or x.device.type != "cpu":

        def memory() -> Tensor:
            return workspace.take(x.shape[0] * height * width, last.in_features, x).view(*x.shape[:-1], -1)

        hidden = activated(linear(first, mixed(), memory))
        if not norm.is_plain:
            return x.add_(linear(last, norm(hidden)))
        scale = norm.scale(_response(hidden))
        if x.shape[0] == 1 and _folds(height * width, last):
            return x.add_(dense(hidden, *_folded(last, scale.flatten(), norm.beta.to(x).flatten())))
        return x.add_(linear(last, torch.addcmul(norm.beta.to(x), hidden, scale.to(hidden.dtype), out=hidden)))
    beta = norm.beta.to(x).flatten()
    for number, image in enumerate(x):
        hidden = workspace.take(height * width, last.in_features, x)
        response = x.new_zeros(last.in_features, dtype=torch.float32)
        for rows in strips(height, width, hidden_bytes, x.device):
            part = activated(linear(first, mixed(slice(number, number + 1), rows))).flatten(0, -2)
            response += squares(part)
            hidden[rows.start * width : rows.stop * width] = part
        scale = norm.scale(response.sqrt()).flatten()
        folded = _folded(last, scale, beta) if _folds(height * width, last) else None
        for rows in strips(height, width, hidden_bytes, x.device):
            part = hidden[rows.start * width : rows.stop * width]
            if folded is None:
                product = linear(last, torch.addcmul(beta, part, scale.to(part.dtype), out=part))
            else:
                product = dense(part, *folded)
            image[rows].add_(product.view_as(image[rows]))
    return x


def activated(hidden: Tensor) -> Tensor:
    """GELU, written over its input."""
    return torch.ops.aten.gelu_(hidden)


def _response(hidden: Tensor) -> Tensor:
    """Norm of each channel of ``[B, H, W, C]`` over its picture, ``[B, 1, 1, C]`` float32."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        # The sum of squares over a picture leaves float16's range long before a single activation does.
        return torch.linalg.vector_norm(hidden, dim=(1, 2), keepdim=True, dtype=torch.float32)
    batch, height, width, channels = hidden.shape
    if hidden.numel() <= _FEW:
        return (hidden * hidden).sum((1, 2), keepdim=True).sqrt_()
    response = hidden.new_zeros(batch, 1, 1, channels)
    for image, total in zip(hidden, response, strict=True):
        for rows in strips(height, width, channels * hidden.element_size(), hidden.device):
            total += squares(image[rows].flatten(0, 1))
    return response.sqrt_()


def _folds(rows: int, last: nn.Module) -> bool:
    """Whether it costs less to scale the weight of the linear layer after a norm than the `rows` that it reads."""
    weights = at_hand(last)
    return weights is not None and rows > 2 * weights[0].shape[0]


def _folded(last: nn.Module, scale: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that do what the linear layer does to ``x * scale + beta``."""
    weight, bias = at_hand(last)
    shifted = torch.mv(weight, beta)
    return (weight * scale).to(weight.dtype), shifted if bias is None else shifted + bias
