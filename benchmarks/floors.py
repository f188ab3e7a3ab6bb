"""How fast a machine could be: operations over its rate of matrix products, bytes over its rate of copying.

The larger of the two is the floor of a case: no arrangement of the same float arithmetic is faster. The rate is the
better of a matrix product and of a 1x1 convolution, which is the same product by another library. Counted are matrix
products, convolutions and attention, which `torch.utils.flop_counter` sees (on a CPU it misses attention, which is
counted here); norms, activations and sums are left out. Bytes are weights once per model call, inputs and outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# Large enough that a product runs at its full rate and a copy leaves every cache.
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_CACHED_PRODUCT = (4096, 1536, 384)
_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
_TRIES = 5


@dataclass(frozen=True)
class Rates:
    """What the machine can do: float operations per second in a product of large matrices, bytes per second read and
    written in a large copy."""

    operations: float
    bytes: float


def measured_rates(device: torch.device, dtype: torch.dtype, small: bool = False) -> Rates:
    """The best of several tries. small: tiny ones, for tests, whose figures mean nothing."""
    side = 64 if small else _MATRIX_SIDE[device.type]
    count = (2**12 if small else _COPIED_BYTES[device.type]) // 4
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    image, filters = left.t()[None, :, None], right[:, :, None, None]  # the rows of `left` as pixels
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    ways = (lambda: torch.mm(left, right, out=product), lambda: F.conv2d(image, filters))
    found = [2 * side**3 / min(fastest(way, device) for way in ways)]
    if device.type == "cpu" and not small:
        # What stays in the caches runs faster yet.
        positions, width, out = _CACHED_PRODUCT
        image, filters = torch.randn(1, 1, positions, width).permute(0, 3, 1, 2), torch.randn(out, width, 1, 1)
        image, filters = image.to(dtype), filters.to(dtype)
        found.append(2 * positions * width * out / fastest(lambda: F.conv2d(image, filters), device))
    return Rates(
        max(found),
        2 * 4 * count / fastest(lambda: target.copy_(source), device),
    )


def fastest(run: Callable[[], Any], device: torch.device, tries: int = _TRIES) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    run()
    return min(_seconds(run, device) for _ in range(tries))


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _attention_operations(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Two operations per multiplication: scores, and values weighted by them."""
    *batch, length, width = query
    count = 1
    for size in batch:
        count *= size
    return 2 * count * length * key[-2] * (width + value[-1])


def operations(run: Callable[[], Any]) -> int:
    """Float operations of one run: two for every multiplication and addition of a product."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_operations}) as counter:
        run()
    return counter.get_total_flops()


def floor(rates: Rates, counted: int, moved: int) -> dict[str, Any]:
    """Seconds below which this machine cannot do so many operations and move so many bytes, and what sets the limit."""
    compute, traffic = counted / rates.operations, moved / rates.bytes
    return {
        **{f"{name}_per_second": value for name, value in asdict(rates).items()},
        "operations": counted,
        "bytes": moved,
        "seconds": max(compute, traffic),
        "limit": "operations" if compute >= traffic else "bytes",
    }
