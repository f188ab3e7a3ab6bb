"""Rounding to few bits so that small changes are kept on average.

A weight of bfloat16 has 8 significant bits, one of float8 3 or 4. A change below half of the last one is lost when it
is rounded to the nearest, in every weight and so altogether. Rounded up with a chance equal to the part that is cut
off, it is kept on average (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015).
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

# So many at a time: what is needed beside the weights stays small.
_CHUNK = 1 << 22


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Float32 `values` in a float `dtype` of fewer bits: each is one of its two neighbours there, the nearer one more
    often, so that the mean is right. Values that `dtype` holds stay exactly; those beyond its range become its largest.

    name: of the weight: the same values of the same name round the same way each time, on every device.
    """
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    flat, out, seed = values.reshape(-1), result.view(-1), zlib.crc32(name.encode())
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        out[start : start + len(part)] = _rounded(part, _uniform(part, start, seed), dtype)
    return result


def _rounded(values: Tensor, uniform: Tensor, dtype: torch.dtype) -> Tensor:
    kind = torch.finfo(dtype)
    # The distance of neighbours: by the exponent, and among the smallest numbers that of the smallest normal one.
    exponent = torch.frexp(values.clamp(-kind.max, kind.max)).exponent - 1
    bits = round(math.log2(kind.eps))
    lowest = max(round(math.log2(kind.smallest_normal)), -126 - bits)  # float32 has no steps below
    step = torch.ldexp(torch.ones_like(values), exponent.clamp(min=lowest) + bits)
    places = values / step
    below = places.floor()
    up = uniform < places - below
    return ((below + up) * step).clamp(-kind.max, kind.max).to(dtype)


def _uniform(like: Tensor, start: int, seed: int) -> Tensor:
    """Numbers in [0, 1) by place, from a mix of its bits (the 64-bit finaliser of splitmix: Steele et al., 2014)."""
    bits = torch.arange(start, start + len(like), device=like.device) + ((seed >> 1) << 32)
    bits = bits * -7046029254386353131  # 0x9E3779B97F4A7C15, wrapping round
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = bits ^ _shifted(bits, 31)
    return _shifted(bits, 40).float() / 2**24


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right with zeros, as unsigned numbers shift."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
