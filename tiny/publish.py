"""Gather the finished parts of a recipe under the names and with the metadata that the family is known by.

    python -m stable_cascade_nodes.tiny.publish --out DIR [--adapters]

copies the finished parts of a training folder to the package's weights, as float16; with ``--adapters`` the adapters,
which say the rest themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..cascade_ops.checkpoints import inspect_file, load, save
from ..cascade_ops.checkpoints.saving import write_tensors
from .family import WEIGHTS

# What the evaluation was best with; see docs/tiny.md.
DEFAULTS = {
    "stage_c": {"width": 256, "height": 256, "guidance": 2.0, "steps": 20, "shift": 1.0},
    "stage_b": {"width": 256, "height": 256, "guidance": 2.0, "steps": 10, "shift": 1.5},
}


def save_part(module: nn.Module, path: Path, stage: str, config: dict, dtype: torch.dtype | None = None) -> None:
    """Write a part of the family; None keeps the float32 that it was trained in."""
    save(module, path, stage=stage, config=config, defaults=DEFAULTS.get(stage), name="tiny", dtype=dtype)


def gather(out: Path, target: Path) -> list[Path]:
    """Copy the parts of a training folder to ``target/<part>.safetensors`` as float16."""
    from .recipe import PARTS

    paths = []
    for stage, place in PARTS.items():
        path = target / f"{stage}.safetensors"
        if stage in ("text_encoder", "image_encoder"):
            # Their files hold tensors beside the model's (the rows of the token table, the retrieval projection).
            halve(out / place, path, {"cascade.name": "tiny"})
        else:
            module, info = load(out / place, expect=stage)
            save_part(module, path, stage, info.config, torch.float16)
        paths.append(path)
    return paths


def gather_adapters(out: Path, target: Path) -> list[Path]:
    """Copy the adapters of a training folder that are finished, as float16, with their metadata as it is."""
    from .recipe import ADAPTERS

    found = {name: out / place for name, place in ADAPTERS.items() if (out / place).is_file()}
    return [halve(source, target / f"{name}.safetensors") for name, source in found.items()]


def halve(source: Path, target: Path, more: dict[str, str] | None = None) -> Path:
    """Copy a file with its metadata and `more`, float32 tensors as float16."""
    with safe_open(str(source), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = {**(file.metadata() or {}), **(more or {})}
    tensors = {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    write_tensors(target, {n: (t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()}, metadata)
    return target


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Gather the finished parts of a training folder.")
    parser.add_argument("--out", type=Path, required=True, help="the training folder")
    parser.add_argument("--to", type=Path, default=WEIGHTS, help="where to; default: the package's weights")
    parser.add_argument("--adapters", action="store_true", help="the adapters instead of the family")
    given = parser.parse_args(arguments)
    for path in (gather_adapters if given.adapters else gather)(given.out, given.to):
        print(inspect_file(path).describe())


if __name__ == "__main__":
    main()
