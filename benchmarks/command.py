"""The command line of the benchmark; see `__main__`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import report
from .cases import CASES, chosen
from .measuring import MODES, Options, child, measure
from .profiling import profile


def _parser(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = Options()
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=own.repeats, help="rounds of timing (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: what torch takes by itself)")
    parser.add_argument("--steps", type=int, default=own.steps, help="of the chains with random weights, either stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small models: a try of the command, not of speed")
    parser.add_argument("--folder", default="", help="where files for the loading cases go (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here, after every case")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file, measure nothing")
    parser.add_argument("--profile", metavar="CASE", help="print where the time of a case goes, by kind of operation")
    return parser


def run(arguments: Sequence[str], about: str) -> int:
    """Do what the arguments say; the exit code."""
    if arguments[:1] == ["child"]:
        return _child(*arguments[1:])
    asked = _parser(about).parse_args(arguments)
    try:
        return _run(asked)
    except ValueError as error:
        return report.refuse(str(error))


def _run(asked: argparse.Namespace) -> int:
    if asked.table:
        print(report.table(report.read(asked.table)), end="")
        return 0
    if asked.repeats < 1 or asked.steps < 1 or asked.threads < 0:
        raise ValueError(
            f"{asked.repeats} repeats, {asked.steps} steps and {asked.threads} threads were asked for, expected at "
            "least 1, 1 and 0."
        )
    if asked.device != "cpu" and not (asked.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"The device {asked.device} was asked for, expected cpu, or cuda where there is a GPU.")
    options = Options(asked.repeats, asked.threads, asked.steps, asked.device, asked.quick, asked.folder)
    cases = chosen([asked.profile] if asked.profile else asked.cases)
    if find_spec("diffusers") is None:
        raise ValueError(
            "diffusers is not installed and is what the benchmark compares with: "
            "pip install 'stable-cascade-nodes[benchmark]'."
        )
    if asked.profile:
        print(profile(cases[0], options), end="")
        return 0
    return _measure(cases, options, asked.json)


def _measure(cases: Sequence[Any], options: Options, path: Path | None) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "machine": report.machine(torch.device(options.device)),
        "dtype": str(options.dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "quick": options.quick,
        "cases": [],
    }
    for case in cases:
        row = measure(case, options)
        result["cases"].append(row)
        ratio = f", {row['ratios']['ours']:.2f} x" if row["status"] == "measured" else f": {row['reason']}"
        print(f"{case.name}: {row['status']}{ratio}", file=sys.stderr, flush=True)
        if path:
            report.write(result, path)
    print(report.table(result), end="")
    return 1 if any(row["status"] == "failed" for row in result["cases"]) else 0


def _child(mode: str, name: str, options: str) -> int:
    if mode not in MODES:
        raise ValueError(f"{mode!r} is not measured, expected one of {', '.join(MODES)}.")
    try:
        answer = child(mode, name, Options(**json.loads(options)))
    except (ValueError, MemoryError) as error:
        answer = {"error": str(error) or "out of memory"}
    print(json.dumps(answer))
    return 0
