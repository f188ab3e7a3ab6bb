"""What single operations cost on this CPU: why the fast paths are what they are (`docs/performance.md`).

    python -m stable_cascade_nodes.benchmarks.passes [--repeats 9]

Matrix products of the published models' layers in float32, by PyTorch's own product, by oneDNN's convolution of one
position, and as `models.dense` does them, in billions of operations a second; and passes over the hidden layer of Stage
B's outermost level into new memory and over itself (`models.in_place`), in milliseconds. Fastest of the repeats.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cascade_ops.models.dense import dense
from .floors import fastest

# Positions, channels in and out.
_PRODUCTS = {
    "Stage C lite, MLP, guided": (1152, 1536, 6144),
    "Stage C lite, MLP back": (1152, 6144, 1536),
    "Stage C lite, attention": (1152, 1536, 1536),
    "Stage C 3.6B, MLP, guided": (1152, 2048, 8192),
    "Stage C 3.6B, MLP back": (1152, 8192, 2048),
    "Stage B lite, level 1, MLP": (16384, 320, 1280),
    "Stage B lite, level 1, MLP back": (16384, 1280, 320),
    "Stage B lite, level 2, MLP": (4096, 576, 2304),
    "Stage B lite, level 3, MLP": (1024, 1152, 4608),
    "Stage A, a strip, MLP": (4096, 384, 1536),
}
_HIDDEN = (16384, 1280)
_CPU = torch.device("cpu")


def _products(repeats: int) -> None:
    print("| layer | positions | in, out | matrix product, G/s | by convolution, G/s | as done here, G/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (positions, width, out) in _PRODUCTS.items():
        x, weight, bias = torch.randn(positions, width), torch.randn(out, width), torch.randn(out)
        row = x.view(1, 1, positions, width).permute(0, 3, 1, 2)
        plain = fastest(lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias), _CPU, repeats)
        other = fastest(lambda row=row, w=weight[:, :, None, None], bias=bias: F.conv2d(row, w, bias), _CPU, repeats)
        memory = torch.empty(positions, out)
        way = partial(dense, x, weight, bias, lambda memory=memory: memory)
        ours = fastest(way, _CPU, repeats)
        operations = 2e-9 * positions * width * out
        rates = f"{operations / plain:.0f} | {operations / other:.0f} | {operations / ours:.0f} | {plain / ours:.2f}"
        print(f"| {name} | {positions} | {width}, {out} | {rates} |", flush=True)


def _passes(repeats: int) -> None:
    hidden, scale, shift = torch.randn(_HIDDEN), torch.rand(_HIDDEN[1]), torch.rand(_HIDDEN[1])

    def strips() -> Tensor:
        total = torch.zeros(_HIDDEN[1])
        for part in hidden.split(1024):
            total += (part * part).sum(0)
        return total.sqrt()

    pairs = {
        "GELU": (lambda: F.gelu(hidden), lambda: torch.ops.aten.gelu_(hidden)),
        "times scale plus shift": (
            lambda: torch.addcmul(shift, hidden, scale),
            lambda: torch.addcmul(shift, hidden, scale, out=hidden),
        ),
        "norm of each channel (second: strip by strip)": (
            lambda: torch.linalg.vector_norm(hidden, dim=0),
            strips,
        ),
    }
    print(f"\n| pass over {_HIDDEN[0]} x {_HIDDEN[1]} float32 | new memory, ms | over itself, ms | ratio |")
    print("|---|---|---|---|")
    for name, (new, over) in pairs.items():
        first, second = fastest(new, _CPU, repeats), fastest(over, _CPU, repeats)
        print(f"| {name} | {first * 1e3:.1f} | {second * 1e3:.1f} | {first / second:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads\n")
    with torch.no_grad():
        _products(arguments.repeats)
        _passes(arguments.repeats)


if __name__ == "__main__":
    main()
