"""Results as a JSON file and as a table in Markdown, which can be printed again from the file."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .floors import Rates, floor

NOT_MEASURED = "not measured"
_HEADINGS = ("case", "ours", "diffusers", "ratio", "target", "floor", "ours / floor", "peak, ours", "peak, diffusers")


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know about the machine to judge the figures."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "transformers": _version("transformers"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(result: Mapping[str, Any]) -> str:
    """The table of a result, with the machine above it and notes below it."""
    about, rows = result["machine"], _with_floors(result["cases"])
    where = about["gpu"] or f"{about['processor']}, {about['cores']} cores, {about['threads']} threads"
    head = (
        f"{where}; {result['dtype']}; torch {about['torch']}, diffusers {about['diffusers']}, "
        f"transformers {about['transformers']}; {result['repeats']} rounds in turns, medians."
    )
    if result["quick"]:
        head = f"Small models, to try the command: the figures mean nothing. {head}"
    lines = [head, "", _row(_HEADINGS), _row(["---"] * len(_HEADINGS))]
    notes: list[str] = []
    for row in rows:
        lines.extend(_row(cells) for cells in _cells(row))
        notes.extend(f"- {row['title']}: {note}." for note in _notes(row))
    if not about["gpu"]:
        on_gpu = (row["title"] for row in rows if row["computes"])
        lines.extend(_row([f"{title}, bfloat16 on a GPU", *[NOT_MEASURED] * 3, *[""] * 5]) for title in on_gpu)
    return "\n".join([*lines, "", *notes]) + "\n"


def _with_floors(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with floors by the best rates that any of them found: what slows a machine for a moment is no limit."""
    found = [row["floor"] for row in rows if "floor" in row]
    if not found:
        return list(rows)
    best = Rates(*(max(each[f"{name}_per_second"] for each in found) for name in ("operations", "bytes")))
    return [
        {**row, "floor": floor(best, row["floor"]["operations"], row["floor"]["bytes"])} if "floor" in row else row
        for row in rows
    ]


def _notes(row: Mapping[str, Any]) -> Sequence[str]:
    if row["status"] != "measured":
        return [f"{row['status']}: {row['reason']}"]
    agreement = f"the results differ by {row['difference']:.1e} at most" if row["difference"] else ""
    limit = f"the floor is set by {row['floor']['limit']}" if "floor" in row else ""
    return [note for note in ("; ".join(filter(None, [*row["notes"], agreement, limit])),) if note]


def _cells(row: Mapping[str, Any]) -> list[list[str]]:
    """The row of a case, and one more for each other way of ours."""
    if row["status"] != "measured":
        return [[row["title"], *[NOT_MEASURED] * 3, *[""] * 5]]
    theirs = row["sides"]["theirs"]
    result = []
    for name, side in row["sides"].items():
        if name == "theirs":
            continue
        least = row.get("floor", {}).get("seconds")
        first = name == "ours"
        result.append(
            [
                row["title"] if first else f"{row['title']}, {name}",
                _seconds(side),
                _seconds(theirs),
                f"{row['ratios'][name]:.2f}",
                f"{row['target']:g}" if row["target"] else "",
                _duration(least) if least else "",
                f"{side['median'] / least:.2f}" if least else "",
                *(_bytes(row.get(f"memory_{whose}")) if first else "" for whose in ("ours", "theirs")),
            ]
        )
    return result


def _seconds(side: Mapping[str, Any]) -> str:
    return f"{_duration(side['median'])} ± {100 * side['spread']:.0f} %"


def _duration(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def _bytes(memory: Mapping[str, int] | None) -> str:
    if memory is None:
        return ""
    return f"{memory['growth'] / 1e9:.2f} GB of {memory['total'] / 1e9:.2f} GB"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(result: Mapping[str, Any], path: Path) -> None:
    """As a JSON file that appears under its name when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """A result that `write` wrote; ValueError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        table(result)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no results of this benchmark ({error}), expected a file written with --json: name another."
        ) from error
    return result


def refuse(message: str) -> int:
    """One sentence where it is read, and the exit code of a refusal."""
    print(message, file=sys.stderr)
    return 2
