"""Global response norm on channels-last activations; Woo et al., "ConvNeXt V2" (2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_EPS = 1e-6


def response_share(response: Tensor) -> Tensor:
    """Each channel's share of the response: `response`, its norms over a picture ``[..., C]``, over their mean."""
    return response / (response.mean(dim=-1, keepdim=True) + _EPS)


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Scale each channel of ``[B, H, W, C]`` by its share of the response of the whole picture.

    Args:
        x: activations ``[B, H, W, C]``.
        gamma, beta: learned weights ``[1, 1, 1, C]``.

    Returns:
        ``[B, H, W, C]``: ``x (1 + gamma share) + beta``.
    """
    if torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad or beta.requires_grad):
        return _ResponseNorm.apply(x, gamma, beta)
    return _response_norm(x, gamma, beta)[0]


def _response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    # The sum of squares over a picture leaves float16's range long before a single activation does.
    response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    return torch.addcmul(beta, x, 1 + gamma * response_share(response).to(x.dtype)), response


class _ResponseNorm(torch.autograd.Function):
    """`response_norm` with its gradient by hand.

    A block's largest activations are here. Derived operation by operation, the gradient makes twice as many tensors of
    that size as the three below.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y, response = _response_norm(x, gamma, beta)
        ctx.save_for_backward(x, gamma, response)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, response = ctx.saved_tensors
        total = response.mean(dim=-1, keepdim=True) + _EPS
        share = response / total
        along = (grad * x).sum(dim=(1, 2), keepdim=True, dtype=torch.float32)
        grad_share = gamma.float() * along
        spread = (grad_share * share).mean(dim=-1, keepdim=True)
        # A channel that is zero everywhere has no direction to grow in: its norm's gradient counts as zero.
        pull = torch.where(response > 0, (grad_share - spread) / (total * response), 0.0)
        grad_x = torch.addcmul(grad * (1 + gamma * share.to(x.dtype)), x, pull.to(x.dtype))
        if not any(ctx.needs_input_grad[1:]):
            return grad_x.to(x.dtype), None, None  # Frozen, as under a LoRA: beta's gradient would read all of `grad`.
        grad_gamma = (along * share).sum(dim=0, keepdim=True)
        grad_beta = grad.sum(dim=(0, 1, 2), keepdim=True, dtype=torch.float32)
        return grad_x.to(x.dtype), grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype)
