"""Weights of 8 bits: the large matrices of Stage C and Stage B in half the memory of bfloat16. An approximation.

Each row of a matrix (one output) is stored as 8-bit values and one float32 scale. A layer turns its rows back into the
dtype of its input when it runs and multiplies as usual, so activations, sums and everything small keep their
precision, and nothing but the weights is rounded. Two formats:

* int8: ``round(w / s)`` with ``s`` the largest absolute value of the row over 127, rounded up to a number of bfloat16,
  so that the scale is exact in every dtype that a layer computes in. The error is at most ``s / 2``.
* float8 (e4m3fn): ``w / s`` rounded to the nearest, with ``s`` the power of two that takes the row into the format's
  range. The error is at most 1/16 of the value, and ``s / 1024`` where that is larger.

A file that holds 8-bit floats keeps its own values, of either kind, with a scale of 1.

Kept as they are: the last level of Stage C (`up_blocks.1` of the release), whose activations are the largest and which
the output hangs on; embedding, output and resampling layers, timestep and condition mappers, depthwise convolutions,
norms and biases, which together are a few hundredths of the weights.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018), for symmetric scales; Micikevicius et al., "FP8 Formats for Deep Learning" (2022), for the 8-bit floats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .models.dense import dense
from .models.layers import Attention

if TYPE_CHECKING:
    from .checkpoints import FileInfo

# What a loader calls the weights -> the dtype of their values.
FORMATS = {"float8 weights": torch.float8_e4m3fn, "int8 weights": torch.int8}
STAGES = ("stage_c", "stage_b")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE = "_scale"  # behind the name of a weight

_MATRIX = re.compile(
    r"^(?:down|up)_blocks\.\d+\.\d+\."
    r"(?:channelwise\.[04]\.weight|attention\.attn\.(?:in_proj_weight|out_proj\.weight)|kv_mapper\.1\.weight)$"
)
_INT8_STEPS = 127
# Rows of zeros too have a scale that can be divided by; the smallest number that no device flushes to zero.
_LEAST_SCALE = 2.0**-126
# So many values at a time: what is needed beside the weights stays small.
_CHUNK = 1 << 22


def is_matrix(name: str) -> bool:
    """Whether a published tensor name is that of a large matrix of Stage C or Stage B."""
    return _MATRIX.match(name) is not None


def matrices(stage: str, names: Iterable[str]) -> list[str]:
    """Which of a stage's published tensor names are large matrices that are stored in 8 bits."""
    found = [name for name in names if is_matrix(name)]
    if stage != "stage_c":
        return found
    last = max((int(name.split(".")[1]) for name in found if name.startswith("up_blocks.")), default=0)
    return [name for name in found if not name.startswith(f"up_blocks.{last}.")]


def float_dtype(stage: str, dtype: str) -> str:
    """What a loader of all stages loads one as where it was told `dtype`: ``auto`` where that stage has no 8 bits."""
    return "auto" if dtype in FORMATS and stage not in STAGES else dtype


def eight_bit_size(info: FileInfo, compute: torch.dtype) -> int:
    """Bytes of the weights of a file in 8 bits, all that keeps its precision in `compute`."""
    shapes = {name: recipe.shape for name, recipe in info.recipes.items()}
    small = set(matrices(info.stage, shapes))
    # Stored in 8 bits: kept so, in the last level too.
    small |= {name for name, recipe in info.recipes.items() if is_matrix(name) and recipe.dtype.startswith("F8_")}
    return sum(
        prod(shape) + 4 * shape[0] if name in small else prod(shape) * compute.itemsize
        for name, shape in shapes.items()
    )


# The values ----------------------------------------------------------------------------------------------------


def quantized(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit values of the shape of `weight` ``[out, in]`` and a float32 scale ``[out]``; see the top for the formats.

    dtype: ``int8`` or a float8. A weight that has it already is kept, with a scale of 1.

    Raises:
        ValueError: the weight holds what is no finite number.
    """
    if weight.dtype == dtype or weight.dtype in FLOAT8:
        return weight, torch.ones(len(weight), device=weight.device)
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    rows = max(1, _CHUNK // max(1, weight[0].numel()))
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float()
        scale[start : start + rows] = scale_of(part, dtype)
        values[start : start + rows] = nearest(part / scale[start : start + rows, None], dtype)
    if not bool(scale.isfinite().all()):
        raise ValueError("it holds values that are no finite numbers")
    return values, scale


def scale_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale ``[out]`` of the rows of a float32 `weight` ``[out, in]``."""
    largest = weight.abs().amax(dim=1)
    if dtype == torch.int8:
        # Rounded up to the 8 significant bits of bfloat16.
        bits = ((largest / _INT8_STEPS).view(torch.int32) + 0xFFFF) & ~0xFFFF
        return bits.view(torch.float32).clamp(min=_LEAST_SCALE)
    exponent = torch.frexp(largest / torch.finfo(dtype).max)[1]
    scale = torch.ldexp(torch.ones_like(largest), exponent).clamp(min=_LEAST_SCALE)
    return torch.where(largest.isfinite(), scale, largest)


def nearest(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest 8-bit values of what was divided by its scale."""
    if dtype == torch.int8:
        return scaled.round().clamp(-_INT8_STEPS, _INT8_STEPS).to(dtype)
    return scaled.to(dtype)


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in a float `dtype`: values times scale, rounded once."""
    # A scale can lie below the range of float16.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return values.to(wide).mul_(scale.to(wide)[:, None]).to(dtype)


# The layers ----------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Linear):
    """A linear layer over 8-bit values ``weight`` and scales ``weight_scale``.

    It computes in the dtype of its input and fetches its weights to where its input is. Nothing may read its `weight`
    as if it were the matrix: ask `weight_of`.
    """

    weight_scale: Tensor

    def __init__(self, values: Tensor, scale: Tensor, bias: nn.Parameter | None):
        super().__init__(values.shape[1], values.shape[0], bias=False, device="meta")
        self.register_parameter("bias", bias)
        _hold(self, "weight", values, scale)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.weight_scale, self.bias)


class QuantizedAttention(Attention):
    """Attention over 8-bit values ``in_proj_weight`` and scales ``in_proj_weight_scale``."""

    in_proj_weight_scale: Tensor

    def __init__(self, layer: Attention, values: Tensor, scale: Tensor):
        nn.Module.__init__(self)
        self.nhead, self.dropout = layer.nhead, layer.dropout
        self.in_proj_bias, self.out_proj = layer.in_proj_bias, layer.out_proj
        _hold(self, "in_proj_weight", values, scale)

    def project(self, tokens: Tensor, parts: slice) -> Tensor:
        c = tokens.shape[-1]
        rows = slice(parts.start * c, parts.stop * c)
        return _linear(tokens, self.in_proj_weight[rows], self.in_proj_weight_scale[rows], self.in_proj_bias[rows])

    def packed(self) -> QuantizedLinear:
        """The packed projection as a layer of its own over the same tensors."""
        return QuantizedLinear(self.in_proj_weight, self.in_proj_weight_scale, self.in_proj_bias).eval()


def _hold(layer: nn.Module, name: str, values: Tensor, scale: Tensor) -> None:
    kept = isinstance(values, nn.Parameter)
    setattr(layer, name, values if kept else nn.Parameter(values, requires_grad=False))
    layer.register_buffer(name + SCALE, scale)


def _linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # 8 bits are moved where the weights wait elsewhere, not what they become.
    weight = dequantized(values.to(x.device), scale.to(x.device), x.dtype)
    return dense(x, weight, None if bias is None else bias.to(x))


# Models --------------------------------------------------------------------------------------------------------


def with_eight_bits(module: nn.Module, names: Mapping[str, torch.dtype]) -> None:
    """Put layers of 8 bits in place of those with the weights `names`, which have the dtypes given there.

    module: a model that was just built. The new weights have no memory: they are assigned when they are read.
    """
    for name, dtype in names.items():
        owner, _, leaf = name.rpartition(".")
        parent, _, place = owner.rpartition(".")
        old: Any = module.get_submodule(owner)
        values = torch.empty(getattr(old, leaf).shape, dtype=dtype, device="meta")
        scale = torch.empty(len(values), device="meta")
        new = (
            QuantizedAttention(old, values, scale)
            if isinstance(old, Attention)
            else QuantizedLinear(values, scale, old.bias)
        )
        setattr(module.get_submodule(parent), place, new.train(old.training))


def is_quantized(module: nn.Module) -> bool:
    """Whether some layer of a model holds weights of 8 bits."""
    return any(isinstance(layer, QuantizedLinear | QuantizedAttention) for layer in module.modules())


def working_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest matrix that a layer turns into `dtype` while it runs; 0 where none has 8 bits."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear | QuantizedAttention)]
    weights = (weight for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim == 2)
    size = dtype.itemsize if dtype != torch.float16 else dtype.itemsize + 4
    return size * max((weight.numel() for weight in weights), default=0)


def weight_of(module: nn.Module, name: str) -> Tensor:
    """A weight of a model by its published name, in float32, whatever its layer holds it in."""
    values, scale = module.get_parameter(name).detach(), scale_beside(module, name)
    return values.float() if scale is None else dequantized(values, scale, torch.float32)


def scale_beside(module: nn.Module, name: str) -> Tensor | None:
    """The scales of the rows of a weight; None where its layer holds no 8-bit values."""
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner)._buffers.get(leaf + SCALE)
