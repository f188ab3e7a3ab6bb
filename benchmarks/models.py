"""The networks that are compared: published sizes, and small ones for tests, with random weights.

Weights are made once and in place, so that a model of the largest size that a machine can hold can be compared: the
other implementation gets views of the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cascade_ops.checkpoints.loading import ParametersWithoutMemory
from ..cascade_ops.models import StageA, StageB, StageC

_STAGE_B_LITE: dict[str, Any] = {
    "c_hidden": [320, 576, 1152, 1152],
    "nhead": [-1, 9, 18, 18],
    "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
}
_STAGE_C_LITE: dict[str, Any] = {
    "c_cond": 1536,
    "c_hidden": [1536, 1536],
    "nhead": [24, 24],
    "blocks": [[4, 12], [12, 4]],
}
# The same depth of levels and all kinds of blocks, a few channels wide.
_STAGE_C_SMALL: dict[str, Any] = {
    "c_cond": 32,
    "c_hidden": [32, 48],
    "nhead": [2, 3],
    "blocks": [[1, 2], [2, 1]],
    "c_clip_text": 20,
    "c_clip_text_pooled": 24,
    "c_clip_img": 12,
}
_STAGE_B_SMALL: dict[str, Any] = {
    "c_cond": 24,
    "c_hidden": [8, 12, 16, 16],
    "nhead": [-1, -1, 2, 2],
    "blocks": [[1, 1, 2, 1], [1, 2, 1, 1]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 1, 1]],
    "c_clip": 24,
}

# By stage and size: the constructor's arguments.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "stage_c": {"full": {}, "lite": _STAGE_C_LITE, "small": _STAGE_C_SMALL},
    "stage_b": {"full": {}, "lite": _STAGE_B_LITE, "small": _STAGE_B_SMALL},
    "stage_a": {"full": {}, "small": {"bottleneck_blocks": 2, "c_hidden": 16, "codebook_size": 8}},
}
CLASSES: dict[str, type[nn.Module]] = {"stage_a": StageA, "stage_b": StageB, "stage_c": StageC}

_STD = 0.02
# Stage A's gates multiply whole branches: near 0 they would hide what a branch computes.
_GATE_STD = 0.3


def without_memory(stage: str, config: Mapping[str, Any]) -> nn.Module:
    """A stage whose weights have shapes and no memory, in evaluation mode."""
    with ParametersWithoutMemory():
        module = CLASSES[stage](**config)
    return module.eval().requires_grad_(False)


def random_weights(
    shapes: Mapping[str, Tensor],
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Tensors of the shapes of a state dict, normal with a deviation of 0.02: activations stay finite at any depth."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, like in shapes.items():
        if not like.is_floating_point():
            weights[name] = torch.zeros(like.shape, dtype=like.dtype, device=device)
            continue
        tensor = torch.empty(like.shape, dtype=dtype, device=device)
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, _GATE_STD if name.endswith("gammas") else _STD, generator=generator)
        weights[name] = tensor
    return weights


def random_stage(
    stage: str,
    size: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A stage of a size in CONFIGS with random weights, in evaluation mode."""
    module = without_memory(stage, CONFIGS[stage][size])
    module.load_state_dict(random_weights(module.state_dict(), seed, device, dtype), assign=True)
    return module.requires_grad_(False)


def bytes_of(*modules: nn.Module) -> int:
    """Memory of the weights of all modules, those that are shared counted once."""
    seen = {tensor.data_ptr(): tensor for module in modules for tensor in module.parameters()}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
