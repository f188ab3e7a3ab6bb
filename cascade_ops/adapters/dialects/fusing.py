"""Attention's fused query, key and value as three LoRAs, and three as one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..changes import WeightChange
from ..lora import LoRAWeights
from ..names import FUSED, located, thirds_of


def loras(weights: Mapping[str, WeightChange]) -> dict[str, LoRAWeights]:
    """The same changes; ValueError for one that is no LoRA."""
    result = {}
    for name, change in weights.items():
        if not isinstance(change, LoRAWeights):
            kind = type(change).__name__.removesuffix("Weights")
            raise ValueError(
                f"'{name}' is changed by a {kind}, which can be applied but neither written nor trained on, expected a "
                "LoRA there: choose a LoRA."
            )
        result[name] = change
    return result


def split(weights: Mapping[str, WeightChange]) -> dict[str, LoRAWeights]:
    """With thirds in place of fused changes: the three share `down`, and `up` is cut by rows, so the change stays the
    same.

    Raises:
        ValueError: a DoRA whose sizes are of all three together; a change of another kind.
    """
    result: dict[str, LoRAWeights] = {}
    for name, change in loras(weights).items():
        if not name.endswith(FUSED):
            _add(result, name, change)
            continue
        scales: tuple[Tensor | None, ...] = (None, None, None)
        if change.dora_scale is not None:
            if len(change.dora_scale) == 1:
                raise ValueError(
                    f"'{name}' has one set of DoRA sizes for query, key and value together, which no split layout can "
                    "hold: train it with sizes for each of them."
                )
            scales = change.dora_scale.chunk(3)
        for third, up, scale in zip(thirds_of(name), change.up.chunk(3), scales, strict=True):
            _add(result, third, LoRAWeights(change.down, up, change.alpha, scale))
    return result


def _add(weights: dict[str, LoRAWeights], name: str, change: LoRAWeights) -> None:
    """Put a change beside one that the same weight may have already: the ranks add up."""
    other = weights.get(name)
    if other is not None:
        if change.dora_scale is not None or other.dora_scale is not None:
            raise ValueError(
                f"'{name}' is changed twice, as a third and as a whole, and once by a DoRA, which no layout can hold "
                "as one change: apply them one after the other."
            )
        both = (other, change)
        down = torch.cat([one.down.float() for one in both])
        up = torch.cat([one.up.float() * one.scale for one in both], dim=1)
        change = LoRAWeights(down, up, float(len(down)))
    weights[name] = change


def fuse(weights: Mapping[str, WeightChange]) -> dict[str, LoRAWeights]:
    """With fused changes in place of thirds.

    Thirds that share `down` and alpha, as those from `split` do, become what they were. Others are put side by side:
    the rank is the sum of theirs, and each row of `up` uses its own part of it. Missing thirds do not change.

    Raises:
        ValueError: a DoRA for some of the thirds only; a change of another kind.
    """
    result: dict[str, LoRAWeights] = {}
    groups: dict[str, dict[int, LoRAWeights]] = {}
    for name, change in loras(weights).items():
        target, third = located(name)
        if third is None:
            result[name] = change
        else:
            groups.setdefault(target, {})[third] = change
    for target, thirds in groups.items():
        _add(result, target, _joined(target, thirds))
    return result


def _joined(target: str, thirds: Mapping[int, LoRAWeights]) -> LoRAWeights:
    first = next(iter(thirds.values()))
    scale = None
    with_scale = [change.dora_scale for _, change in sorted(thirds.items()) if change.dora_scale is not None]
    if with_scale:
        if len(with_scale) < 3 or len({tuple(one.shape) for one in with_scale}) > 1:
            raise ValueError(
                f"'{target}' has DoRA sizes for some of query, key and value only, which a fused layout cannot hold: "
                "write it in a split layout."
            )
        scale = torch.cat(with_scale)
    shared = all(
        change.alpha == first.alpha and change.down.shape == first.down.shape and torch.equal(change.down, first.down)
        for change in thirds.values()
    )
    rows = len(first.up)
    if shared:
        ups = [thirds[i].up if i in thirds else torch.zeros_like(first.up) for i in range(3)]
        return LoRAWeights(first.down, torch.cat(ups), first.alpha, scale)
    downs = torch.cat([change.down.float() for change in thirds.values()])
    up = torch.zeros(3 * rows, len(downs))
    column = 0
    for third, change in thirds.items():
        # The fused rank and alpha are equal, so each third's own scale goes into its numbers.
        up[third * rows : (third + 1) * rows, column : column + change.rank] = change.up.float() * change.scale
        column += change.rank
    return LoRAWeights(downs, up, float(len(downs)), scale)
