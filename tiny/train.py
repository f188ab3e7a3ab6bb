"""Train the whole tiny family from nothing.

    python -m stable_cascade_nodes.tiny.train --out DIR --jobs 3

renders the pictures, trains every part as soon as what it needs is there, ``--jobs`` of them side by side with one
thread each; ``--publish`` copies the finished parts
to the package's weights. An interrupted run goes on where it stopped: each
part resumes from its own checkpoint. The logs are ``DIR/<part>.log``.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from .recipe import default_device, log

_PACKAGE = __package__


@dataclass(frozen=True)
class Part:
    """One command of the recipe: a module with its arguments, and the parts that it waits for."""

    command: tuple[str, ...]
    needs: tuple[str, ...]


def pool(split: str, count: int) -> tuple[str, ...]:
    return ("pool", "--out", "{out}/pool", "--split", split, "--count", str(count))


def clip(task: str) -> tuple[str, ...]:
    return ("train_clip", task, "--out", "{out}", "--pool", "{out}/pool", "--device", "{device}")


def stage(name: str) -> tuple[str, ...]:
    return (f"train_{name}", "--out", "{out}", "--device", "{device}")


# The longest chain (latent encoder, then Stages B and C) comes first where there is a choice.
RECIPE = {
    "train_pool": Part(pool("train", 30_000), ()),
    "text_encoder": Part(clip("text"), ()),
    "test_pool": Part(pool("test", 2_000), ()),
    "latent_encoder": Part(stage("latent_encoder"), ("train_pool",)),
    "stage_a": Part(stage("stage_a"), ("train_pool", "test_pool")),
    "image_encoder": Part(clip("image"), ("train_pool", "text_encoder")),
    "stage_c": Part(stage("stage_c"), ("latent_encoder", "text_encoder")),
    "stage_b": Part(stage("stage_b"), ("latent_encoder", "text_encoder", "stage_a")),
}


def run_part(name: str, out: Path, device: str, threads: int) -> None:
    """Run one part in a process of its own, its output in a log file.

    Raises:
        RuntimeError: the part failed; names its log.
    """
    module, *rest = (word.format(out=out, device=device) for word in RECIPE[name].command)
    command = [sys.executable, "-m", f"{_PACKAGE}.{module}", *rest]
    with (out / f"{name}.log").open("a", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        ).returncode
    if code:
        raise RuntimeError(f"{name} ended with code {code}: read {out / name}.log, then run the same command again.")


def train(out: Path, device: str, jobs: int, threads: int) -> None:
    """Run all parts that are not finished, each after the parts that it needs."""
    out.mkdir(parents=True, exist_ok=True)
    # A part may write files before it is whole; only the marker says that its command ended well.
    done = {name for name in RECIPE if (out / f"{name}.done").exists()}
    running: dict[Future, str] = {}
    with ThreadPoolExecutor(jobs) as workers:
        while len(done) < len(RECIPE):
            for name, part in RECIPE.items():
                ready = name not in done and name not in running.values() and done.issuperset(part.needs)
                if ready and len(running) < jobs:
                    log(f"{name}: started")
                    running[workers.submit(run_part, name, out, device, threads)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                future.result()
                (out / f"{name}.done").touch()
                done.add(name)
                log(f"{name}: finished")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the whole tiny family from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, checkpoints and finished parts")
    parser.add_argument("--device", default=default_device(), help="where to train; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=3, help="parts that train side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each part")
    parser.add_argument("--publish", action="store_true", help="copy the finished parts to the package's weights")
    given = parser.parse_args(arguments)
    train(given.out.resolve(), given.device, given.jobs, given.threads)
    if given.publish:
        from . import publish

        publish.main(["--out", str(given.out)])


if __name__ == "__main__":
    main()
