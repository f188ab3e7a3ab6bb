"""A model with LoRAs merged into its weights.

All LoRAs of a handle are merged at once, in float32, into the weights that the model had without any, when the model is
first used. So each adds what it adds to the plain model, their order does not matter, what cancels out leaves no trace,
and weights of few bits are rounded once (`rounding` keeps small changes there). Handles between two loaders merge
nothing, and what no LoRA changes is shared with the plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..float16 import divided, scale_of, scaled_rows
from ..handles import StageHandle
from ..models.unet import CascadeUNet
from ..quantized import weight_of
from ..text import TextEncoder
from .changes import WeightChange
from .names import located
from .rounding import rounded_like


@dataclass(frozen=True, eq=False)
class Applied:
    """Changes of weights by name (see `names`), all of which fit, and how strong they are. name: of the file."""

    name: str
    changes: Mapping[str, WeightChange]
    strength: float


@dataclass(frozen=True, eq=False)
class AdaptedHandle(StageHandle):
    """A stage with LoRAs. `module` is the merged model, made when it is first asked for and then kept.

    plain: what `module` would be without them. applied: the LoRAs.
    """

    plain: Any = None
    applied: tuple[Applied, ...] = ()

    @property  # type: ignore[misc]
    def module(self) -> Any:
        # `replace` takes it from here and puts it into the new handle, so the merged model is made once.
        kept = self.__dict__
        if kept["module"] is None:
            kept["module"] = _merged(self.plain, self.applied)
        return kept["module"]

    @module.setter
    def module(self, value: Any) -> None:
        self.__dict__["module"] = value

    def to(self, device: torch.device | str) -> StageHandle:
        """This stage on `device`: there it is a model of its own, and LoRAs that come later add to the merged one."""
        if self.device == torch.empty(0, device=device).device:
            return self
        return _without_history(self).to(device)


def unmerged(handle: StageHandle) -> StageHandle:
    """The handle without its LoRAs, for a look at its weights."""
    if not isinstance(handle, AdaptedHandle):
        return handle
    return StageHandle(handle.stage, handle.plain, handle.info, handle.name, weights=handle.weights)


def adapted(handle: StageHandle, lora: Applied, defaults: Mapping[str, float | str]) -> AdaptedHandle:
    """The handle with one more LoRA, and with `defaults` in place of some of its own sampling defaults."""
    plain, before = (handle.plain, handle.applied) if isinstance(handle, AdaptedHandle) else (handle.module, ())
    values = {field.name: getattr(handle, field.name) for field in fields(StageHandle) if field.name != "module"}
    values["info"] = replace(handle.info, defaults={**handle.info.defaults, **defaults})
    return AdaptedHandle(module=None, plain=plain, applied=(*before, lora), **values)


def with_vectors(handle: StageHandle, tokens: Mapping[str | int, Tensor]) -> StageHandle:
    """A text encoder's handle that also knows `tokens`, see `TextEncoder.with_tokens`; its LoRAs stay on it."""
    if not isinstance(handle, AdaptedHandle):
        return replace(handle, module=handle.module.with_tokens(tokens))
    return replace(handle, module=None, plain=handle.plain.with_tokens(tokens))


def rows_of(weight: Tensor, third: int | None) -> Tensor:
    """The rows of a weight that a change is for: all, or those of one third of attention's fused weight."""
    return weight if third is None else weight.chunk(3)[third]


def _without_history(handle: StageHandle) -> StageHandle:
    return StageHandle(**{field.name: getattr(handle, field.name) for field in fields(StageHandle)})


@torch.no_grad()
def _merged(plain: nn.Module | TextEncoder, applied: Sequence[Applied]) -> nn.Module | TextEncoder:
    """`plain` with the changes in its weights; every other weight is the same tensor."""
    if isinstance(plain, TextEncoder):
        return plain.with_module(_merged(plain.module, applied))
    parts: dict[str, list[tuple[int | None, WeightChange, float]]] = {}
    # Sums of float32 depend on the order in their last bits; this one is not that in which they were applied.
    for lora in sorted(applied, key=lambda each: (each.name, each.strength)):
        for name, change in lora.changes.items():
            target, third = located(name)
            parts.setdefault(target, []).append((third, change, lora.strength))
    scaled = divided(plain) if isinstance(plain, CascadeUNet) and scale_of(plain) != 1 else {}
    # deepcopy takes what the memo already holds instead of copying it: untouched weights are the same tensors.
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    for target, changes in parts.items():
        # A change is meant for the weights as they were published.
        weight = scaled_rows(weight_of(plain, target), scaled.get(target), scale_of(plain))
        total = torch.zeros_like(weight)
        for third, change, strength in changes:
            rows = rows_of(total, third)
            rows += change.added(rows_of(weight, third), strength)
        changed = scaled_rows(weight + total, scaled.get(target), 1 / scale_of(plain))
        memo |= rounded_like(plain, target, changed)
    return copy.deepcopy(plain, memo)
