"""Peak memory of loading a full-size Stage C lite file (1.03 billion parameters, 4.1 GB in float32).

Writes a file of the published shapes with random values, loads it in a process of its own and compares the growth of
that process's peak resident memory with the size of the weights. The bound is 1.15 times the weights plus 200 MB.

    python -m stable_cascade_nodes.benchmarks.load_memory [--folder DIR] [--split]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..cascade_ops.checkpoints import load
from ..cascade_ops.checkpoints.loading import ParametersWithoutMemory
from ..cascade_ops.checkpoints.saving import write_tensors
from ..cascade_ops.models import StageC

LITE: dict[str, Any] = {
    "c_cond": 1536,
    "c_hidden": [1536, 1536],
    "nhead": [24, 24],
    "blocks": [[4, 12], [12, 4]],
}


def write_lite(path: Path, split: bool) -> int:
    """Write the file one tensor at a time, with q/k/v apart if ``split``, and return the bytes of its weights."""
    with ParametersWithoutMemory():
        shapes = {name: tuple(tensor.shape) for name, tensor in StageC(**LITE).state_dict().items()}
    if split:
        for name in [name for name in shapes if ".in_proj_" in name]:
            rows, *rest = shapes.pop(name)
            for letter in "qkv":
                shapes[name.replace("attn.in_proj_", f"to_{letter}.")] = (rows // 3, *rest)
    entries = {
        name: (torch.float32, shape, lambda shape=shape: torch.randn(shape).mul_(0.02))
        for name, shape in shapes.items()
    }
    write_tensors(path, entries, {"format": "pt"})
    return 4 * sum(prod(shape) for shape in shapes.values())


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss also counts the parent, of which a new process is a copy at first
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_and_report(path: Path) -> None:
    """In the child: print the peak before and after loading, and the seconds that it took."""
    before, start = peak_bytes(), time.perf_counter()
    model, info = load(path, "stage_c")
    seconds = time.perf_counter() - start
    assert sum(parameter.numel() for parameter in model.parameters()) == info.parameters
    print(before, peak_bytes(), seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write the 4.1 GB file (default: the temporary folder)")
    parser.add_argument("--split", action="store_true", help="store q/k/v apart, as diffusers does")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        load_and_report(arguments.child)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "stage_c_lite.safetensors"
        weights = write_lite(path, arguments.split)
        command = [sys.executable, "-m", __spec__.name, "--child", str(path)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, peak, seconds = (float(word) for word in answer.split())
    bound = 1.15 * weights + 200e6
    verdict = "kept" if peak <= bound else "BROKEN"
    print(f"weights                {weights / 1e9:.3f} GB")
    print(f"peak before loading    {before / 1e9:.3f} GB (Python and torch)")
    print(f"peak after loading     {peak / 1e9:.3f} GB in {seconds:.1f} s")
    print(
        f"peak / weights         {peak / weights:.3f} with everything, {(peak - before) / weights:.3f} above the start"
    )
    print(f"bound                  {bound / 1e9:.3f} GB (1.15 x weights + 200 MB): {verdict}")
    return 0 if peak <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
