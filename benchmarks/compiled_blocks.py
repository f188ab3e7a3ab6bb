"""What `torch.compile` gains and what its start-up costs: the table of `docs/performance/acceleration.md`.

    python -m stable_cascade_nodes.benchmarks.compiled_blocks

Runs on a GPU in bfloat16 where there is one, else on the CPU in float32 with a half or a quarter of the width. Each
network has random weights and the lite depth. Plain and compiled runs alternate; the times are medians. Start-up is the
first compiled run less a later one. With a cache of the compiler's on disk (`TORCHINDUCTOR_CACHE_DIR`) it is shorter
the second time; give it an empty folder to measure the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cascade_ops.compiling import compiled, compiling
from ..cascade_ops.models import StageA, StageB, StageC

_DEPTH_B: dict[str, Any] = {"blocks": [[2, 4, 14, 4], [4, 14, 4, 2]], "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]]}


def _stage_c(cuda: bool) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    width, heads = (1536, 24) if cuda else (384, 6)
    model = StageC(c_cond=width, c_hidden=[width] * 2, nhead=[heads] * 2, blocks=[[4, 12], [12, 4]])
    model, x, text = _ready(model, cuda, (2, 16, 24, 24), (2, 77, 1280))
    prepared = model.prepare(torch.tensor([0.5], device=x.device), text)
    return model, lambda network: network.step(x, prepared, 0)


def _stage_b(cuda: bool) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    widths, heads = ([320, 576, 1152, 1152], [-1, 9, 18, 18]) if cuda else ([80, 144, 288, 288], [-1, -1, 18, 18])
    side = 256 if cuda else 128
    model, x, prior, text = _ready(
        StageB(**_DEPTH_B, c_hidden=widths, nhead=heads), cuda, (2, 4, side, side), (2, 16, 24, 24), (2, 1, 1280)
    )
    prepared = model.prepare(torch.tensor([0.5], device=x.device), prior, text, (side, side))
    return model, lambda network: network.step(x, prepared, 0)


def _stage_a(cuda: bool) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    side = 256 if cuda else 96
    model, latent = _ready(StageA(c_hidden=384 if cuda else 192), cuda, (1, 4, side, side))
    return model, lambda network: network.decode(latent)


CASES = {"Stage C step, guided": _stage_c, "Stage B step, guided": _stage_b, "Stage A decode": _stage_a}


def _ready(model: nn.Module, cuda: bool, *shapes: tuple[int, ...]) -> list[Any]:
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a new network ends in zeros
                parameter.normal_(std=0.02)
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    return [model.to(device, dtype).eval().requires_grad_(False), *tensors]


def _seconds(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = run()
    if result.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def measure(case: str, repeats: int) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    model, run = CASES[case](torch.cuda.is_available())
    _seconds(lambda: run(model))
    with compiling(case):
        twin = compiled(model)
        first, fast = _seconds(lambda: run(twin))
        times = [[_seconds(lambda each=each: run(each))[0] for each in (model, twin)] for _ in range(repeats)]
    plain, quick = (statistics.median(column) for column in zip(*times, strict=True))
    wrong = (fast.float() - run(model).float()).abs().max() / fast.float().abs().max()
    gain = plain - quick
    worth = f"{(first - quick) / gain:.0f}" if gain > 0 else "never"
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"| {case} ({parameters:.0f} M) | {plain:.3f} s | {quick:.3f} s | {plain / quick:.2f} | {first - quick:.0f} s "
        f"| {worth} | {wrong:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=list(CASES), nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {where}")
    print("| case | plain | compiled | ratio | start-up | worth it after runs | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for case in arguments.case:
        print(measure(case, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
