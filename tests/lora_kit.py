"""A Stage C of a few channels, and LoRAs of it."""

from pathlib import Path

import torch

from stable_cascade_nodes.cascade_ops.adapters.dialects.reference import adaptable
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, LoRAWeights
from stable_cascade_nodes.cascade_ops.adapters.names import THIRDS, located
from stable_cascade_nodes.cascade_ops.checkpoints import FileInfo
from stable_cascade_nodes.cascade_ops.handles import StageHandle
from stable_cascade_nodes.cascade_ops.models import StageC

CONFIG = {
    "c_cond": 6,
    "c_hidden": [8, 8],
    "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]],
    "c_clip_text": 10,
    "c_clip_text_pooled": 10,
    "c_clip_img": 5,
    "dropout": 0.0,
}
ATTENTION = "down_blocks.0.2.attention.attn."


def small_stage_c(seed=0):
    torch.manual_seed(seed)
    model = StageC(**CONFIG).eval()
    torch.nn.init.normal_(model.clf[1].weight, std=0.3)  # zeros at first
    return model


def handle_of(module, **defaults):
    """A Stage C as if it came from a file, with these sampling defaults."""
    empty = {"rank": 2, "parameters": 0, "tensors": 0, "weight_bytes": 0, "prefix": "", "dtypes": (), "unknown": ()}
    info = FileInfo(Path("c"), "stage_c", "custom", layout="original", config={}, defaults=defaults, **empty)
    return StageHandle("stage_c", module, info, "c.safetensors")


def random_change(shape, rank=2, alpha=1.5, seed=0, dora_shape=None):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, generator=generator)
    scale = None if dora_shape is None else 0.5 + torch.rand(dora_shape, generator=generator)
    return LoRAWeights(down, up, alpha, scale)


def random_lora(model, names, rank=2, alpha=1.5, dora=False, **more):
    """Random changes of the named weights, thirds of attention too; DoRA with one size per input."""
    shapes = adaptable(model)
    weights = {}
    for seed, name in enumerate(names):
        target, third = located(name)
        shape = tuple(shapes[target])
        if third is not None:
            shape = (shape[0] // 3, *shape[1:])
        parts = 3 if name.endswith("in_proj_weight") else 1
        dora_shape = (parts, shape[1], *(1,) * (len(shape) - 2)) if dora else None
        weights[name] = random_change(shape, rank, alpha, seed, dora_shape)
    return LoRA(weights, **more)


def deltas(weights):
    """The change of every whole weight, from the definition, thirds put in their rows; float64."""
    result = {}
    for name, change in weights.items():
        target, third = located(name)
        down, up = change.down.double(), change.up.double()
        delta = change.alpha / len(down) * torch.einsum("or,r...->o...", up, down)
        if third is not None:
            whole = torch.zeros(3 * len(up), *delta.shape[1:], dtype=torch.float64)
            whole[third * len(up) : (third + 1) * len(up)] = delta
            delta = whole
        result[target] = result.get(target, 0) + delta
    return result


def scales(weights):
    """DoRA sizes by whole weight, thirds stacked."""
    result = {}
    for name, change in sorted(weights.items(), key=lambda item: located(item[0])[1] or 0):
        if change.dora_scale is not None:
            result.setdefault(located(name)[0], []).append(change.dora_scale)
    return {name: torch.cat(parts) for name, parts in result.items()}


def same_change(found, expected, tolerance=1e-6):
    """Both change the same weights by the same amounts."""
    ours, theirs = deltas(found), deltas(expected)
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], delta, rtol=tolerance, atol=tolerance * delta.abs().max().item())
    ours, theirs = scales(found), scales(expected)
    assert ours.keys() == theirs.keys()
    for name, scale in theirs.items():
        torch.testing.assert_close(ours[name], scale, rtol=1e-6, atol=0)


def thirds(prefix=ATTENTION):
    return [prefix + third for third in THIRDS]
