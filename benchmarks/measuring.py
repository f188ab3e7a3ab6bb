"""One case measured: what a child process does, and how the parent asks for it.

Time is taken in a child of its own, both sides in turns; the peak memory of each side in another one, which holds that
side alone. So no case sees what another has left behind.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .cases import CASES, Case
from .comparing import Run, check_agreement, in_turns, seconds_of, summary
from .diffusers_models import diffusers_class
from .floors import floor, measured_rates, operations
from .load_memory import peak_bytes
from .stage_cases import Setting

# Where one round of all sides takes less, the first rounds do not count.
_SHORT_SECONDS = 1.0
_WARM_UPS = 3
_PREPARATIONS = 3
MODES = ("time", "memory_ours", "memory_theirs")


@dataclass(frozen=True)
class Options:
    """repeats: rounds of timing. threads: of the CPU, 0 is what torch takes by itself. steps: of the chains with random
    weights, for either stage. device: of torch. quick: small models, whose figures mean nothing. folder: for files."""

    repeats: int = 5
    threads: int = 0
    steps: int = 2
    device: str = "cpu"
    quick: bool = False
    folder: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if torch.device(self.device).type == "cuda" else torch.float32

    def setting(self, sides: str) -> Setting:
        return Setting(torch.device(self.device), self.dtype, sides, self.quick, self.steps, self.folder)


def measure(case: Case, options: Options) -> dict[str, Any]:
    """The row of a case, measured in children; a reason in it where it could not be."""
    row: dict[str, Any] = {"name": case.name, "title": case.title, "target": case.target, "computes": case.computes}
    missing = "" if options.quick else _lacking(case, options)
    if missing:
        return {**row, "status": "not measured", "reason": missing}
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        asked = {**asdict(options), "folder": folder}
        for mode in MODES:
            answer = _in_child(case.name, mode, asked)
            if "error" in answer:
                return {**row, "status": "failed", "reason": f"{mode}: {answer['error']}"}
            row.update(answer)
    return {**row, "status": "measured"}


def _lacking(case: Case, options: Options) -> str:
    needed, free = case.needed_bytes(options.dtype), free_bytes(torch.device(options.device))
    if free is None or needed <= free:
        return ""
    return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free where the models go; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    information = Path("/proc/meminfo")
    if not information.exists():
        return None
    line = next(line for line in information.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _in_child(name: str, mode: str, options: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("__main__.py")), "child", mode, name, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": said[-1] if said else f"the process ended with code {done.returncode}"}


def child(mode: str, name: str, options: Options) -> dict[str, Any]:
    """What is measured in this process; printed by the caller."""
    if options.threads:
        torch.set_num_threads(options.threads)
    case, device = CASES[name], torch.device(options.device)
    with torch.no_grad():
        if mode == "time":
            return _time(case, options)
        if not case.computes:
            return {}
        return {mode: _memory(case, mode.removeprefix("memory_"), options, device)}


def _time(case: Case, options: Options) -> dict[str, Any]:
    device, setting = torch.device(options.device), options.setting("both")
    difference, exactly = None, ""
    if case.check_in_float32 and setting.dtype != torch.float32:
        difference = check_agreement(case.build(replace(setting, dtype=torch.float32)))
        exactly = "agreement was checked in float32"
    sides = case.build(setting)
    runs: dict[str, Run] = {"ours": sides.ours, "theirs": sides.theirs, **sides.variants}

    def clock(run: Run) -> float:
        return run() if sides.seconds else seconds_of(run, device)

    start = time.perf_counter()
    if difference is None:
        difference = check_agreement(sides)
    else:  # in this dtype the ways of ours must still agree with one another
        check_agreement(replace(sides, theirs=sides.ours, theirs_to_check=None))
    if time.perf_counter() - start < _SHORT_SECONDS:
        for run in [*runs.values()] * _WARM_UPS:
            clock(run)
    row: dict[str, Any] = {"difference": difference, "tolerance": sides.tolerance, "notes": list(sides.notes)}
    row["notes"] += [exactly] if exactly else []
    share = 0.0
    if sides.prepare is not None:
        prepared = statistics.median(clock(sides.prepare) for _ in range(_PREPARATIONS))
        share = prepared / sides.prepared_steps
        row["prepare"] = {"seconds": prepared, "steps": sides.prepared_steps}
        row["notes"].append(f"ours holds 1/{sides.prepared_steps} of preparing a run")
    samples = in_turns(list(runs.values()), min(options.repeats, case.repeats), clock)
    own = {name: 0.0 if name == "theirs" else share for name in runs}
    timed = {name: [one + own[name] for one in each] for name, each in zip(runs, samples, strict=True)}
    row["sides"] = {name: summary(each) for name, each in timed.items()}
    theirs = row["sides"]["theirs"]["median"]
    row["ratios"] = {name: theirs / side["median"] for name, side in row["sides"].items() if name != "theirs"}
    if sides.moved:
        rates = measured_rates(device, setting.dtype, options.quick)
        row["floor"] = floor(rates, operations(sides.ours) if sides.counted else 0, sides.moved)
    return row


def _memory(case: Case, side: str, options: Options, device: torch.device) -> dict[str, int]:
    """Bytes that one run of one side adds to what was there before it, and all that this side took beside Python and
    the libraries of both."""
    if device.type == "cuda":
        run = getattr(case.build(options.setting(side)), side)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        peak = torch.cuda.max_memory_allocated(device)
        return {"growth": peak - before, "total": peak}
    import_libraries()
    start = _resident_bytes()
    run = getattr(case.build(options.setting(side)), side)
    before = _resident_bytes()
    _forget_peak()
    run()
    peak = peak_bytes()
    return {"growth": peak - before, "total": peak - start}


def import_libraries() -> None:
    """What either side may import, so that it counts for none."""
    from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline  # noqa: F401
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

    diffusers_class("stage_a")


def _resident_bytes() -> int:
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def _forget_peak() -> None:
    """Let the system count the peak of this process anew, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
