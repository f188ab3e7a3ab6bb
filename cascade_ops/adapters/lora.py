"""Low-rank adaptation in memory: what a LoRA file of any dialect holds, and how it changes a model.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); DoRA: Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation" (2024). `dialects` reads and writes files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..handles import StageHandle
from .names import located, stage_of
from .tokens import LearnedToken

# As trainers do, so that a row or column of zeros is no division by zero.
_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """The change of one weight ``[out, in, ...]``: ``alpha / r * up @ down``.

    down: ``[r, in, ...]``. up: ``[out, r]``. dora_scale: the learned sizes of DoRA: ``[out, 1, ...]`` one per output,
    ``[1, in, ...]`` one per input, ``[3, in]`` one per input of each third of attention's fused weight; None is plain
    LoRA.

    Raises:
        ValueError: the shapes do not belong together.
    """

    down: Tensor
    up: Tensor
    alpha: float
    dora_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.down.ndim < 2 or self.up.ndim != 2 or self.up.shape[1] != self.down.shape[0] or not len(self.down):
            raise ValueError(
                f"A LoRA has down {list(self.down.shape)} and up {list(self.up.shape)}, expected [rank, in] and "
                "[out, rank]: the file is damaged or of another kind."
            )
        scale = self.dora_scale
        if scale is None:
            return
        width = self.down.shape[1]
        ones = (1,) * (self.down.ndim - 2)
        allowed = {(len(self.up), 1, *ones), (1, width, *ones), (3, width, *ones)}
        if tuple(scale.shape) not in allowed:
            raise ValueError(
                f"A DoRA scale has the shape {list(scale.shape)}, expected [{len(self.up)}, 1] or [1, {width}]: the "
                "file is damaged or of another kind."
            )

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self) -> Tensor:
        """The change of the weight before DoRA, float32."""
        return (self.scale * (self.up.float() @ self.down.float().flatten(1))).reshape(self.shape)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The changed weight, float32, for a float32 `weight`. A DoRA's change counts as a whole: at half the strength
        the weight is half-way to what DoRA makes of it."""
        changed = weight + strength * self.delta().to(weight.device)
        if self.dora_scale is None:
            return changed
        full = weight + self.delta().to(weight.device)
        return weight + strength * (rescaled(full, self.dora_scale.to(weight)) - weight)


def sizes(weight: Tensor, like: Tensor) -> Tensor:
    """The Euclidean sizes that DoRA learns, in the shape of `like`: of outputs, of inputs, or of inputs by thirds."""
    if like.shape[1] == 1 and len(like) == len(weight):
        return weight.flatten(1).norm(dim=1).reshape(like.shape)
    groups = weight.unflatten(0, (len(like), -1))
    return groups.transpose(1, 2).flatten(2).norm(dim=2).reshape(like.shape)


def rescaled(weight: Tensor, scale: Tensor, own: Tensor | None = None) -> Tensor:
    """`weight` with the sizes `scale` in place of `own`, which are its sizes unless given."""
    factor = scale / ((sizes(weight, scale) if own is None else own) + _EPSILON)
    return weight * factor.repeat_interleave(len(weight) // len(factor), dim=0)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A LoRA of Stage C, of the text encoder or of both. Immutable.

    weights: changes by the published name of the weight; attention's fused `in_proj_weight` or its thirds, see
    `names`. tokens: learned with it. config: what training said: rank, alpha, modules, base; empty where the file does
    not say. name: the file as the user knows it. unread: tensors of the file that nothing here understands.
    """

    weights: Mapping[str, LoRAWeights]
    tokens: tuple[LearnedToken, ...] = ()
    config: Mapping = field(default_factory=dict)
    name: str = ""
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))

    @property
    def stages(self) -> frozenset[str]:
        """Which of ``stage_c`` and ``text_encoder`` it changes."""
        return frozenset(map(stage_of, self.weights))


@dataclass(frozen=True)
class LoRAReport:
    """What of a LoRA reached a model.

    matched: names of changes that were applied. unmatched: name -> why not, of those that were meant for this part of
    the chain. skipped: names of changes of another part. unread: tensors of the file that nothing here understands.
    """

    matched: tuple[str, ...]
    unmatched: Mapping[str, str]
    skipped: tuple[str, ...]
    unread: tuple[str, ...]

    def describe(self) -> str:
        """In words, with counts: ``128 of 130 changes applied; not applied: ...``."""
        total = len(self.matched) + len(self.unmatched)
        text = f"{len(self.matched)} of {total} changes applied"
        if self.unmatched:
            name, reason = next(iter(self.unmatched.items()))
            text += f"; not applied: {len(self.unmatched)}, the first '{name}' ({reason})"
        if self.skipped:
            text += f"; {len(self.skipped)} are for the {_title(stage_of(self.skipped[0]))}"
        if self.unread:
            text += f"; {len(self.unread)} tensors of the file were not understood, the first '{self.unread[0]}'"
        return text


def apply_lora(handle: StageHandle, lora: LoRA, strength: float = 1.0) -> tuple[StageHandle, LoRAReport]:
    """A handle of the same stage with `lora` merged into its weights, and what was merged.

    handle: a Stage C or a text encoder; neither it nor its weights change, and the new one shares every weight that
    the LoRA does not touch. Weights are merged in float32 whatever they are stored in. strength: 0 gives weights equal
    to the last bit, negative ones turn the change round. Learned tokens are `tokens.with_tokens`' business.

    Raises:
        ValueError: nothing of the LoRA fits this model.
    """
    network = handle.network
    parameters = dict(network.named_parameters())
    mine = {name: change for name, change in lora.weights.items() if stage_of(name) == handle.stage}
    unmatched: dict[str, str] = {}
    for name, change in mine.items():
        if problem := _misfit(parameters, name, change):
            unmatched[name] = problem
    matched = tuple(name for name in mine if name not in unmatched)
    skipped = tuple(name for name in lora.weights if name not in mine)
    report = LoRAReport(matched, MappingProxyType(unmatched), skipped, lora.unread)
    if not matched:
        raise ValueError(_nothing(handle, lora, report))
    if strength == 0:
        return replace(handle), report
    changed: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in matched:
            target, third = located(name)
            if target not in changed:
                changed[target] = parameters[target].to(torch.float32, copy=True)
            rows = _rows(changed[target], third)
            rows.copy_(lora.weights[name].merged(rows, strength))
        fresh = {
            id(parameters[target]): nn.Parameter(weight.to(parameters[target].dtype), requires_grad=False)
            for target, weight in changed.items()
        }
    # deepcopy takes what the memo already holds instead of copying it: untouched weights are the same tensors.
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    module = copy.deepcopy(network, memo | fresh)
    if handle.stage == "text_encoder":
        module = handle.module.with_module(module)
    return replace(handle, module=module), report


def _rows(weight: Tensor, third: int | None) -> Tensor:
    return weight if third is None else weight.chunk(3)[third]


def _misfit(parameters: Mapping[str, Tensor], name: str, change: LoRAWeights) -> str:
    """Why a change cannot be applied; empty where it can."""
    target, third = located(name)
    if target not in parameters:
        return "there is no such weight"
    shape = tuple(_rows(parameters[target], third).shape)
    if shape != change.shape:
        return f"it is of shape {list(change.shape)}, the weight of {list(shape)}"
    return ""


def _title(stage: str) -> str:
    return "text encoder" if stage == "text_encoder" else "Stage C"


def _nothing(handle: StageHandle, lora: LoRA, report: LoRAReport) -> str:
    file = f"The LoRA {lora.name}" if lora.name else "The LoRA"
    if report.unmatched:
        name, reason = next(iter(report.unmatched.items()))
        return (
            f"{file} fits nothing of {handle.title}: '{name}': {reason} ({len(report.unmatched)} in all): "
            "use it with the base model that it was trained on."
        )
    if report.skipped:
        return (
            f"{file} holds {len(report.skipped)} changes of the {_title(stage_of(report.skipped[0]))} and none for "
            f"{handle.title}: apply it to the other model."
        )
    found = f"such as '{lora.unread[0]}'" if lora.unread else "none at all"
    return f"{file} holds no change that Stable Cascade knows (its tensors: {found}): choose another LoRA."
