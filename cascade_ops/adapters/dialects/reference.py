"""The layout of the reference's trainer: changes by position, in the order in which it walks the model.

Source: ``modules/lora.py`` and ``train/train_c_lora.py`` in Stability-AI/StableCascade. Entry i is
``weights.{i}.lora_down [r, in]`` and ``weights.{i}.lora_up [out, r]``; the change is ``up @ down / r`` (alpha is 1 and
not stored), the same for all places of a convolution's kernel. Nothing in the file says which module is which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..changes import WeightChange
from ..lora import LoRAWeights
from ..names import FUSED, matches
from .fusing import fuse

DEFAULT_MODULES = (".attn",)
_ENTRY = re.compile(r"^weights\.(\d+)\.lora_(down|up)$")

# Modules in the order in which the reference's Stage C creates them, at the first place of a name and inside a block;
# attention's fused weight comes after its output layer, since a module's children come before its parametrizations.
_ORDER = (
    "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding", "down_blocks", "down_downscalers",
    "down_repeat_mappers", "up_blocks", "up_upscalers", "up_repeat_mappers", "clf", "depthwise", "attention",
    "channelwise", "kv_mapper", "mapper", "mapper_sca", "mapper_crp", "blocks", "attn", "out_proj", "weight", FUSED,
)  # fmt: skip


def adaptable(network: nn.Module) -> dict[str, torch.Size]:
    """The weights of a Stage C that a LoRA can change, with their shapes: name -> ``[out, in, ...]``."""
    shapes = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            shapes[f"{name}.weight"] = module.weight.shape
        elif isinstance(getattr(module, FUSED, None), Tensor):
            shapes[f"{name}.{FUSED}"] = getattr(module, FUSED).shape
    return shapes


def walked(names: Iterable[str], modules: Sequence[str]) -> list[str]:
    """The weights that module filters reach, in the reference's order."""
    return sorted((name for name in names if matches(name, modules)), key=_place)


def _place(name: str) -> list[tuple[int, int]]:
    return [(1, int(word)) if word.isdigit() else (0, _ORDER.index(word)) for word in name.split(".")]


def is_reference(keys: Iterable[str]) -> bool:
    return any(_ENTRY.match(key) for key in keys)


def read_weights(
    tensors: Mapping[str, Tensor], base: Mapping[str, Sequence[int]], modules: Sequence[Sequence[str]], name: str
) -> dict[str, LoRAWeights]:
    """The changes by name.

    base: the weights of the Stage C that it was trained on, see `adaptable`. modules: module filters to try.

    Raises:
        ValueError: the file fits that model with none of the filters.
    """
    pairs: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _ENTRY.match(key):
            pairs.setdefault(int(match[1]), {})[match[2]] = tensor
    entries = [pairs[i] for i in sorted(pairs)]
    shapes = [(len(pair["up"]), pair["down"].shape[1]) for pair in entries if len(pair) == 2]
    for filters in modules:
        order = walked(base, filters)
        if len(shapes) == len(entries) and [tuple(base[weight][:2]) for weight in order] == shapes:
            return {weight: _change(pair, base[weight]) for weight, pair in zip(order, entries, strict=True)}
    tried = "; ".join(f"{len(walked(base, filters))} for {', '.join(map(repr, filters))}" for filters in modules)
    raise ValueError(
        f"{name} is in the reference's layout, where changes have no names, and its {len(entries)} changes do not fit "
        f"this Stage C (which has {tried}): use the base model that it was trained on, and say with which module "
        "filters."
    )


def _change(pair: Mapping[str, Tensor], shape: Sequence[int]) -> LoRAWeights:
    down = pair["down"]
    if len(shape) > 2:
        down = down.reshape(*down.shape, *(1,) * (len(shape) - 2)).expand(*down.shape, *shape[2:])
    return LoRAWeights(down, pair["up"], 1.0)


def write_weights(
    weights: Mapping[str, WeightChange], base: Mapping[str, Sequence[int]], modules: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of a file, float32. Modules that are not changed get zeros, and smaller ranks are filled up.

    Raises:
        ValueError: a change that this layout has no place for: of a module outside of the filters, of a convolution by
            places of its kernel, or a DoRA.
    """
    fused = fuse(weights)
    order = walked(base, modules)
    for name, change in fused.items():
        problem = _no_place(name, change, base, order)
        if problem:
            raise ValueError(
                f"'{name}' {problem}, which the reference's layout has no place for: write another dialect."
            )
    rank = max(change.rank for change in fused.values())
    tensors = {}
    for i, name in enumerate(order):
        rows, columns = base[name][:2]
        down, up = torch.zeros(rank, columns), torch.zeros(rows, rank)
        if name in fused:
            change = fused[name]
            down[: change.rank] = change.down.reshape(change.rank, columns, -1)[..., 0]
            up[:, : change.rank] = change.up.float() * (change.scale * rank)
        tensors[f"weights.{i}.lora_down"], tensors[f"weights.{i}.lora_up"] = down, up
    return tensors


def _at_every_place(down: Tensor) -> Tensor:
    """What a convolution's `down` is at the first place of the kernel, at all places."""
    return down.reshape(*down.shape[:2], -1)[..., :1].expand(*down.shape[:2], down[0, 0].numel()).reshape(down.shape)


def _no_place(name: str, change: LoRAWeights, base: Mapping[str, Sequence[int]], order: Sequence[str]) -> str:
    if change.dora_scale is not None:
        return "is a DoRA"
    if name not in order:
        return "lies outside of the trained modules of Stage C"
    if tuple(base[name]) != change.shape:
        return f"changes a weight of shape {list(change.shape)} and this Stage C has {list(base[name])}"
    if not torch.equal(_at_every_place(change.down), change.down):
        return "changes the places of a kernel differently"
    return ""
