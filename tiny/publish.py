"""Write a trained part of the tiny family with the metadata that its loader wants.

    python -m stable_cascade_nodes.tiny.publish --out DIR

copies the finished parts of a training folder to the package's weights, as float16.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from ..cascade_ops.checkpoints import inspect_file, load, save
from .family import WEIGHTS

# What the evaluation was best with; see docs/tiny.md.
DEFAULTS = {
    "stage_c": {"width": 256, "height": 256, "guidance": 2.0, "steps": 20, "shift": 1.0},
    "stage_b": {"width": 256, "height": 256, "guidance": 2.0, "steps": 10, "shift": 1.5},
}
PARTS = ("stage_c", "stage_b", "stage_a", "text_encoder", "image_encoder", "latent_encoder", "previewer")


def save_part(module: nn.Module, path: Path, stage: str, config: dict, dtype: torch.dtype | None = None) -> None:
    """Write a part of the family; None keeps the float32 that it was trained in."""
    save(module, path, stage=stage, config=config, defaults=DEFAULTS.get(stage), name="tiny", dtype=dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Copy the finished parts of a training folder to the package.")
    parser.add_argument("--out", type=Path, required=True, help="the training folder")
    given = parser.parse_args(arguments)
    for stage in PARTS:
        source = given.out / f"{stage}.safetensors"
        if stage in ("text_encoder", "image_encoder"):
            # Their files hold tensors beside the model's (the rows of the token table, the retrieval projection).
            halve(source, WEIGHTS / source.name)
        else:
            module, info = load(source, expect=stage)
            save_part(module, WEIGHTS / source.name, stage, info.config, torch.float16)
        print(inspect_file(WEIGHTS / source.name).describe())


def halve(source: Path, target: Path) -> None:
    """Copy a file with its metadata, float32 tensors as float16."""
    from ..cascade_ops.training.loop import read_tensors, write_tensors

    tensors, metadata = read_tensors(source)
    write_tensors({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, target, metadata)


if __name__ == "__main__":
    main()
