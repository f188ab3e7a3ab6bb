"""Our networks with ComfyUI's layers in them.

ComfyUI moves weights between devices layer by layer. A layer of `comfy.ops` whose weights were left in main memory
fetches them, with patches applied, when it is called; a layer of PyTorch fails there. So a network that ComfyUI manages
is rebuilt: the same modules, the same `Parameter` objects, but the layers that hold weights are ComfyUI's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cascade_ops.models.controlnet import AffineNorm
from ..cascade_ops.models.dense import at_hand, dense
from ..cascade_ops.models.layers import Attention, GlobalResponseNorm, as_channels_last, as_image
from ..cascade_ops.models.response_norm import response_norm
from ..cascade_ops.quantized import QuantizedAttention, QuantizedLinear

# Gives the layer to put in place of the one of that name, or None to look inside it.
Lend = Callable[[str, nn.Module], nn.Module | None]


def rebuilt(module: nn.Module, lend: Lend, name: str = "") -> nn.Module:
    """A module of the same structure with other layers in it; what `lend` does not replace is shared, not copied."""
    given = lend(name, module)
    if given is not None:
        return given
    copy = _shallow(module)
    copy._modules = {
        child: None if inner is None else rebuilt(inner, lend, f"{name}.{child}" if name else child)
        for child, inner in module._modules.items()
    }
    return copy


def _shallow(module: nn.Module) -> nn.Module:
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy._parameters = dict(module._parameters)
    copy._buffers = dict(module._buffers)
    return copy


def comfyui_layer(name: str, layer: nn.Module) -> nn.Module | None:
    """ComfyUI's layer over the same weights, or a layer that follows its input; None for anything else."""
    if type(layer) is Attention:
        width = layer.out_proj.in_features
        packed = _with_weights(
            _operations().Linear(width, 3 * width, device="meta"), layer.in_proj_weight, layer.in_proj_bias
        )
        out = comfyui_layer(name, layer.out_proj)
        return LentAttention(layer.nhead, layer.dropout, [packed], out)
    if isinstance(layer, QuantizedAttention):
        packed = comfyui_layer(name, layer.packed())
        return LentAttention(layer.nhead, layer.dropout, [packed], comfyui_layer(name, layer.out_proj))
    if isinstance(layer, QuantizedLinear):
        copy = _shallow(layer)
        # To ComfyUI: weights that may stay in main memory, since the layer fetches them by itself.
        copy.comfy_cast_weights = False
        return copy
    if type(layer) is nn.BatchNorm2d:
        copy = _shallow(layer)
        copy.__class__ = FollowingBatchNorm
        return copy
    if type(layer) is AffineNorm:
        norm = _operations().LayerNorm(layer.normalized_shape, eps=layer.eps, device="meta")
        return LentAffineNorm(_with_weights(norm, layer.weight, layer.bias))
    if type(layer).__name__ == "CLIPVisionEmbeddings":
        inner = _shallow(layer)
        inner._modules = {child: rebuilt(part, comfyui_layer, child) for child, part in layer._modules.items()}
        return FollowingWeights(inner)
    make = _MAKERS.get(type(layer))
    return None if make is None else _with_weights(make(layer), layer.weight, getattr(layer, "bias", None))


def lent_by(network: nn.Module) -> Lend:
    """Lends the layers of ComfyUI's own Stage B or C, which bear the published names except in attention."""

    def lend(name: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) is Attention:
            core = network.get_submodule(name)
            return LentAttention(layer.nhead, layer.dropout, [core.to_q, core.to_k, core.to_v], core.out_proj)
        if type(layer) is GlobalResponseNorm:
            return LentResponseNorm(network.get_submodule(name))
        return network.get_submodule(name) if type(layer) in _MAKERS else None

    return lend


class LentAttention(Attention):
    """Attention over given layers: one for query, key and value packed, or one for each of them."""

    def __init__(self, nhead: int, dropout: float, projections: Sequence[nn.Module], out_proj: nn.Module):
        nn.Module.__init__(self)
        self.nhead, self.dropout, self.out_proj = nhead, dropout, out_proj
        self.projections = nn.ModuleList(projections)
        self.eval()

    def project(self, tokens: Tensor, parts: slice) -> Tensor:
        if len(self.projections) == 3:
            return torch.cat([layer(tokens) for layer in self.projections[parts]], dim=-1)
        c = tokens.shape[-1]
        wanted, weights = slice(parts.start * c, parts.stop * c), at_hand(self.projections[0])
        if weights is None:
            return self.projections[0](tokens)[..., wanted]
        return dense(tokens, weights[0][wanted], weights[1][wanted])


class LentResponseNorm(GlobalResponseNorm):
    """Global response norm with the weights of another one, read at each call: a patch may have replaced them."""

    def __init__(self, norm: nn.Module):
        nn.Module.__init__(self)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return response_norm(x, self.norm.gamma.to(x), self.norm.beta.to(x))


class LentAffineNorm(nn.Module):
    """Layer norm over the channels of ``[B, C, H, W]`` by a given layer, which norms the last axis."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return as_image(self.norm(as_channels_last(x)))


class FollowingWeights(nn.Module):
    """A module that has weights of its own beside layers, which runs with them where its input is."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, x: Tensor, *arguments: Any, **settings: Any) -> Any:
        here = _shallow(self.module)
        here._parameters = {name: _moved(weight, x.device) for name, weight in here._parameters.items()}
        here._buffers = {name: _moved(buffer, x.device) for name, buffer in here._buffers.items()}
        return here(x, *arguments, **settings)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


class FollowingBatchNorm(nn.BatchNorm2d):
    """Batch norm, as in evaluation, that runs where its input is."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            _moved(tensor, x.device) for tensor in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)


def _operations():
    return importlib.import_module("comfy.ops").disable_weight_init


def _with_weights(layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    layer.weight = weight
    if bias is not None or "bias" in layer._parameters:
        layer.bias = bias
    layer.at_hand = partial(_at_hand, ref(layer))
    return layer.eval()


def _at_hand(layer: ref[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias where calling the layer would do nothing more with them; see `cascade_ops.models.dense`."""
    found = layer()
    # What ComfyUI asks before each of its layers is whether the user has stopped the run.
    getattr(importlib.import_module("comfy.ops"), "run_every_op", _nothing)()
    if found is None or found.comfy_cast_weights or found.weight_function or found.bias_function:
        return None
    return found.weight, found.bias


def _nothing() -> None:
    """An older ComfyUI asks nothing."""


def _convolution(kind: str) -> Callable[[nn.Module], nn.Module]:
    def make(layer: nn.Module) -> nn.Module:
        more = {"output_padding": layer.output_padding} if kind == "ConvTranspose2d" else {}
        return getattr(_operations(), kind)(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
            **more,
        )

    return make


# On the meta device: the layer's own weights take no memory and are replaced at once.
_MAKERS: dict[type, Callable[[nn.Module], nn.Module]] = {
    nn.Linear: lambda layer: _operations().Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    ),
    nn.LayerNorm: lambda layer: _operations().LayerNorm(layer.normalized_shape, eps=layer.eps, device="meta"),
    nn.Embedding: lambda layer: _operations().Embedding(layer.num_embeddings, layer.embedding_dim, device="meta"),
    nn.Conv2d: _convolution("Conv2d"),
    nn.ConvTranspose2d: _convolution("ConvTranspose2d"),
}
