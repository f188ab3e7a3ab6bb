"""Where the time of a case goes, by kind of operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from .cases import Case
from .measuring import Options

# The first kind of which a part of the operation's name is one; what is left is elementwise arithmetic.
_KINDS = (
    ("attention", ("attention", "flash", "fmha")),
    ("convolution", ("conv", "cudnn")),
    ("matrix product", ("mm", "linear", "gemm", "dot", "cutlass")),
    ("norm", ("layer_norm", "batch_norm", "vector_norm", "linalg", "group_norm")),
    ("activation", ("gelu", "silu", "softmax", "sigmoid", "relu")),
    ("copy", ("copy", "clone", "contiguous", "cat", "reorder", "memcpy", "fill", "zero", "to_mkldnn", "pad",
              "upsample")),
    ("reduction", ("sum", "mean", "std", "var", "max", "min")),
    ("view and dispatch", ("view", "permute", "transpose", "reshape", "slice", "as_strided", "expand", "empty",
                           "split", "chunk", "narrow", "select", "detach", "unsqueeze", "flatten", "resolve")),
)  # fmt: skip
_REST = "elementwise"
_SHOWN = 12


def kind_of(operation: str, shapes: Sequence[Any] = ()) -> str:
    """The kind of an operation by its name; by the shapes that went in, a 1x1 convolution is a matrix product."""
    name = operation.lower()
    kind = next((kind for kind, parts in _KINDS if any(part in name for part in parts)), _REST)
    if kind == "convolution" and len(shapes) > 1 and list(shapes[1])[2:] == [1, 1]:
        return "matrix product"
    return kind


def profile(case: Case, options: Options) -> str:
    """A table of both sides: seconds in each kind of operation, without those that it calls, and the largest ones."""
    if not case.computes:
        raise ValueError(f"{case.name} runs in other processes, expected a case that computes in this one: choose one.")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    with torch.no_grad():
        sides = case.build(options.setting("both"))
        parts = [_profiled(name, getattr(sides, name), device) for name in ("ours", "theirs")]
    return f"{case.title}\n\n" + "\n".join(parts)


def _profiled(side: str, run: Any, device: torch.device) -> str:
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=activities, record_shapes=True) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_gpu = device.type == "cuda"
    total = 0.0
    kinds, operations, calls = Counter(), Counter(), Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        total += seconds
        kinds[kind_of(event.key, event.input_shapes)] += seconds
        operations[event.key] += seconds
        calls[event.key] += event.count
    lines = [f"{side}: {total:.3g} s", "", "| kind | seconds | share |", "|---|---|---|"]
    lines += [f"| {kind} | {seconds:.4f} | {seconds / total:.1%} |" for kind, seconds in kinds.most_common()]
    lines += ["", "| operation | calls | seconds |", "|---|---|---|"]
    lines += [f"| `{name}` | {calls[name]} | {seconds:.4f} |" for name, seconds in operations.most_common(_SHOWN)]
    return "\n".join(lines) + "\n"
