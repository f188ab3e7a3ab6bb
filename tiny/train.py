"""Train the whole tiny family and its adapters.

    python -m stable_cascade_nodes.tiny.train --out DIR --jobs 3

draws the pictures and trains every part as soon as what it needs is there, ``--jobs`` of them side by side. Each part
is `cascade train` with one of ``tiny/configs``: they are copied to ``DIR/configs``, where their paths lead to the rest
of ``DIR``, and can be run from there by hand as well. An
interrupted recipe goes on where it stopped: each run resumes from its own checkpoint. The logs are ``DIR/<part>.log``.

``--only PART`` trains one part and what it needs. ``--weights DIR`` takes a finished family from a folder, so that only
adapters are trained: ``--weights tiny/weights --only lora``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from .recipe import CONFIGS, PARTS, RECIPE, TRAIN, steps_for

_PACKAGE = __package__.rpartition(".")[0]


def command_of(name: str, out: Path, changes: Sequence[str] = ()) -> list[str]:
    """The module of a step and its arguments; changes: ``NAME=VALUE`` for those that train."""
    words = [word.format(out=out) for word in RECIPE[name].command]
    if tuple(words[: len(TRAIN)]) == TRAIN:
        words += [word for change in changes for word in ("--set", change)]
    return words


def run_step(name: str, out: Path, threads: int, changes: Sequence[str] = ()) -> None:
    """Run one step in a process of its own, its output in a log file.

    Raises:
        RuntimeError: the step failed; names its log.
    """
    module, *rest = command_of(name, out, changes)
    log = out / f"{name}.log"
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", f"{_PACKAGE}.{module}", *rest],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        ).returncode
    if code:
        raise RuntimeError(f"{name} ended with code {code}: read {log}, then run the same command again.")


def train(out: Path, jobs: int, threads: int, only: str | None = None, changes: Sequence[str] = ()) -> None:
    """Run all steps that are not finished, each after those that it needs."""
    wanted = steps_for(only)
    copy_configs(out)
    # A part may write files before it is whole; only the marker says that its command ended well.
    done = {name for name in RECIPE if (out / f"{name}.done").exists()}
    running: dict[Future, str] = {}
    with ThreadPoolExecutor(jobs) as workers:
        while not done.issuperset(wanted):
            for name in wanted:
                ready = name not in done and name not in running.values() and done.issuperset(RECIPE[name].needs)
                if ready and len(running) < jobs:
                    say(f"{name}: started")
                    running[workers.submit(run_step, name, out, threads, changes)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                future.result()
                (out / f"{name}.done").touch()
                done.add(name)
                say(f"{name}: finished")


def copy_configs(out: Path) -> None:
    """Put the configurations where their relative paths lead to the rest of the recipe's folder."""
    (out / "configs").mkdir(parents=True, exist_ok=True)
    for path in CONFIGS.glob("*.yaml"):
        shutil.copyfile(path, out / "configs" / path.name)


def say(line: str) -> None:
    """Print at once, so that a log file can be followed."""
    print(time.strftime("%H:%M"), line, flush=True)


def take_weights(source: Path, out: Path) -> None:
    """Use the finished family of a folder in place of everything that trains one.

    Raises:
        ValueError: a part is not there.
    """
    (out / "weights").mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        path = source / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(f"{source} has no {path.name}, expected a whole family: give the folder of one.")
        shutil.copyfile(path, out / "weights" / path.name)
    for name in steps_for("weights"):
        (out / f"{name}.done").touch()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the tiny family and its adapters.")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, checkpoints and finished parts")
    parser.add_argument("--only", metavar="PART", help=f"train this and what it needs: {', '.join(RECIPE)}")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="take the finished family from this folder")
    parser.add_argument("--jobs", type=int, default=3, help="parts that train side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each part")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every run to have otherwise"
    )
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    if given.weights:
        take_weights(given.weights, out)
    train(out, given.jobs, given.threads, given.only, given.set)


if __name__ == "__main__":
    main()
