"""What the training commands of the tiny family share: their arguments."""

import argparse
from pathlib import Path

import torch


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse(description: str, steps: int, arguments: list[str] | None) -> argparse.Namespace:
    """Read ``--out``, ``--pool``, ``--steps`` and ``--device``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and finished parts")
    parser.add_argument("--pool", type=Path, help="folder of the rendered pictures; default: pool in --out")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps of the whole run")
    parser.add_argument("--device", default=default_device(), help="where to train; default: %(default)s")
    given = parser.parse_args(arguments)
    given.pool = given.pool or given.out / "pool"
    return given


def log(line: str) -> None:
    """Print at once, so that a log file can be followed."""
    print(line, flush=True)
