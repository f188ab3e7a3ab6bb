"""Rounding to few bits so that small changes are kept on average.

A weight of bfloat16 has 8 significant bits, one of float8 3 or 4. A change below half of the last one is lost when it
is rounded to the nearest, in every weight and so altogether. Rounded up with a chance equal to the part that is cut
off, it is kept on average (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015).
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from ..quantized import scale_beside, scale_of

# So many at a time: what is needed beside the weights stays small, and in the cache of a CPU.
_CHUNK = 1 << 20
_FRACTION_BITS = 23  # of float32


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Float32 `values` in a `dtype` of fewer bits: each is one of its two neighbours there, the nearer one more
    often, so that the mean is right. Values that `dtype` holds stay exactly; those beyond its range become its largest.

    name: of the weight: the same values of the same name round the same way each time, on every device.
    """
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    flat, out, seed = values.reshape(-1), result.view(-1), zlib.crc32(name.encode())
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        out[start : start + len(part)] = _rounded(part, _noise(part, start, seed), dtype)
    return result


def rounded_like(model: nn.Module, name: str, values: Tensor) -> dict[int, object]:
    """Float32 `values` of the weight `name` as `model` holds it: by the identity of each tensor, what replaces it.

    A row of int8 keeps its scale unless it outgrows it, and one of float8 gets that of its largest value: so values
    without a change stay what they are.
    """
    parameter, scale = model.get_parameter(name), scale_beside(model, name)
    if scale is None:
        return {id(parameter): nn.Parameter(rounded(values, parameter.dtype, name), requires_grad=False)}
    fitting = scale_of(values, parameter.dtype)
    if parameter.dtype == torch.int8:
        fitting = torch.maximum(scale, fitting)
    changed = rounded(values / fitting[:, None], parameter.dtype, name)
    return {id(parameter): nn.Parameter(changed, requires_grad=False), id(scale): fitting}


def _rounded(values: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        below = values.floor()
        return (below + (_fraction(noise) < values - below)).clamp(-127, 127).to(dtype)
    kind = torch.finfo(dtype)
    values = values.clamp(-kind.max, kind.max)
    # Random bits are added where bits are cut off: they carry over into the last one kept as often as they should.
    cut = (1 << (_FRACTION_BITS + round(math.log2(kind.eps)))) - 1
    result = ((values.view(torch.int32) + (noise & cut)) & ~cut).view(torch.float32)
    if kind.smallest_normal > torch.finfo(torch.float32).smallest_normal:
        # Below its normal numbers the type has steps of one size.
        small = values.abs() < kind.smallest_normal
        places = values[small] / (kind.smallest_normal * kind.eps)
        below = places.floor()
        up = _fraction(noise[small]) < places - below
        result[small] = (below + up) * (kind.smallest_normal * kind.eps)
    return result.to(dtype)


def _fraction(noise: Tensor) -> Tensor:
    """Random bits as numbers from 0 up to but not 1."""
    return ((noise >> 8) & 0xFFFFFF).float() / 2**24


def _noise(like: Tensor, start: int, seed: int) -> Tensor:
    """32 random bits by place: the finaliser of MurmurHash3 (Appleby, 2011) over the number of the place."""
    bits = torch.arange(start, start + len(like), dtype=torch.int32, device=like.device)
    bits *= -1640531535  # an odd constant far from 1, so that neighbours differ in all bits
    bits ^= seed - (1 << 32) if seed >> 31 else seed
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        # Shifted as an unsigned number.
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        bits *= factor
    return bits
