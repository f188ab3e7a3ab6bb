"""Low-rank adaptation in memory: what a LoRA file of any dialect holds, and how it changes a model.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). Other kinds of changes are in `loha` and
`lokr`, DoRA in `changes`; `dialects` reads and writes files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor, nn

from ..checkpoints.releases import SAMPLING_DEFAULTS
from ..diffusion.samplers import SAMPLERS
from ..handles import StageHandle
from . import merging
from .changes import WeightChange, scale_fits
from .names import located, stage_of
from .tokens import LearnedToken

# OneTrainer's words that replace what comes out of the text encoder; how prompts use them no file says.
_BEHIND = ".clip_g_out"


@dataclass(frozen=True, eq=False)
class LoRAWeights(WeightChange):
    """``alpha / r * up @ down``.

    down: ``[r, in, ...]``. up: ``[out, r]``. dora_scale: see `WeightChange`.

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
        if self.dora_scale is not None and not scale_fits(self.dora_scale, self.shape):
            raise ValueError(
                f"A DoRA scale has the shape {list(self.dora_scale.shape)}, expected [{len(self.up)}, 1] or "
                f"[1, {self.down.shape[1]}]: the file is damaged or of another kind."
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
        return (len(self.up), *self.down.shape[1:])

    def delta(self) -> Tensor:
        return (self.scale * (self.up.float() @ self.down.float().flatten(1))).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A LoRA of Stage C, of the text encoder or of both. Immutable.

    weights: changes by the published name of the weight; attention's fused `in_proj_weight` or its thirds, see
    `names`. tokens: learned with it. config: what training said: rank, alpha, modules, base; empty where the file does
    not say. name: the file as the user knows it. unread: tensors of the file that nothing here understands. defaults:
    sampling values of Stage C (``guidance``, ``shift``, ``sampler``, ...) that take the place of the model's own where
    the LoRA is applied.

    Raises:
        ValueError: `defaults` of unknown names, numbers that are none, or a sampler that there is not.
    """

    weights: Mapping[str, WeightChange]
    tokens: tuple[LearnedToken, ...] = ()
    config: Mapping = field(default_factory=dict)
    name: str = ""
    unread: tuple[str, ...] = ()
    defaults: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in self.defaults.items() if name != "sampler"}
        unknown = sorted(set(numbers) - set(SAMPLING_DEFAULTS["stage_c"]))
        right = all(type(v) is not bool and isinstance(v, int | float) and v > 0 for v in numbers.values())
        if unknown or not right or self.defaults.get("sampler", "ddpm") not in SAMPLERS:
            known = ", ".join(SAMPLING_DEFAULTS["stage_c"])
            raise ValueError(
                f"{self.name or 'The LoRA'} brings the sampling defaults {dict(self.defaults)}, expected positive "
                f"numbers for some of {known}, or a sampler of {', '.join(SAMPLERS)}: correct 'cascade.defaults' in "
                "its metadata."
            )
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))
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
        behind = [name for name in self.unread if name.endswith(_BEHIND)]
        strange = [name for name in self.unread if name not in behind]
        if behind:
            text += f"; {len(behind)} learned words act behind the text encoder and are not used, such as '{behind[0]}'"
        if strange:
            text += f"; {len(strange)} tensors of the file were not understood, the first '{strange[0]}'"
        return text


def apply_lora(handle: StageHandle, lora: LoRA, strength: float = 1.0) -> tuple[StageHandle, LoRAReport]:
    """A handle of the same stage with `lora` merged into its weights, and what was merged.

    handle: a Stage C or a text encoder; neither it nor its weights change, and the new one shares every weight that
    the LoRA does not touch. See `merging` for several LoRAs on one model and for weights of few bits. strength: 0 gives
    the handle itself, negative ones turn the change round. The LoRA's own sampling defaults take the place of the
    handle's. Learned tokens are `tokens.with_tokens`' business.

    Raises:
        ValueError: nothing of the LoRA fits this model.
    """
    parameters = dict(merging.unmerged(handle).network.named_parameters())
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
        return handle, report
    changes = {name: lora.weights[name] for name in matched}
    defaults = lora.defaults if handle.stage == "stage_c" else {}
    return merging.adapted(handle, merging.Applied(lora.name, changes, strength), defaults), report


def _misfit(parameters: Mapping[str, nn.Parameter], name: str, change: WeightChange) -> str:
    """Why a change cannot be applied; empty where it can."""
    target, third = located(name)
    if target not in parameters:
        return "there is no such weight"
    return change.misfit(merging.rows_of(parameters[target], third).shape)


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
