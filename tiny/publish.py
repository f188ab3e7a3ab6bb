"""Write a trained part of the tiny family with the metadata that its loader wants."""

import json
from pathlib import Path

import torch
from torch import nn

from ..cascade_ops.training.loop import write_tensors

DEFAULTS = {
    "stage_c": {"width": 256, "height": 256, "guidance": 1.5, "steps": 20, "shift": 1.0},
    "stage_b": {"width": 256, "height": 256, "guidance": 1.1, "steps": 10, "shift": 1.0},
}


def save_part(module: nn.Module, path: Path, stage: str, config: dict, dtype: torch.dtype = torch.float32) -> None:
    """Write ``module`` to ``path`` as safetensors of ``dtype``; integer buffers keep theirs."""
    tensors = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in module.state_dict().items()
    }
    metadata = {"cascade.stage": stage, "cascade.name": "tiny", "cascade.config": json.dumps(config)}
    if stage in DEFAULTS:
        metadata["cascade.defaults"] = json.dumps(DEFAULTS[stage])
    write_tensors(tensors, path, metadata)
