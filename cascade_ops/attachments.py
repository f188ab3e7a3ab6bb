"""What a Stage C handle carries beside its weights: ControlNets with their controls, IP-Adapters with their pictures.

`apply_control` and `apply_ip_adapter` give a new handle that shares the weights; `stages.sample_stage_c` honours what a
handle carries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .control import CONTROL_KINDS
from .families import families_clash
from .models.layers import AttnBlock, ResBlock

if TYPE_CHECKING:
    from .control_inputs import ControlInput
    from .handles import StageHandle
    from .models import StageC

# What can become of several pictures, and how it is said.
COMBINE = {"concatenate": "read together", "average": "averaged", "one each": "for one each"}

# Times come from a float32 linspace; a bound typed as 0.3 must still include the step at 0.29999998.
_TIME_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class AppliedControl:
    """A ControlNet at work.

    network: its handle. control: ``[n, c_in, H, W]``, n = 1 for all pictures or one for each of the batch. strength:
    multiplies its residuals. start, end: times between which it acts; time runs from 1 (noise) to 0 (picture). size:
    ``(height, width)`` of the picture that the control is of; None is the control's own.
    """

    network: StageHandle
    control: Tensor
    strength: float = 1.0
    start: float = 1.0
    end: float = 0.0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_part("ControlNet", self.strength, self.start, self.end)

    def steps(self, times: Sequence[float]) -> tuple[bool, ...]:
        """Whether it acts in the step that begins at each of these times."""
        return _steps(self.strength, self.start, self.end, times)

    def describe(self) -> str:
        """In words: ``ControlNet tiny canny (bundled) at 0.8 from 1 to 0.5``."""
        return _described(self.network, self.strength, self.start, self.end)


@dataclass(frozen=True, eq=False)
class AppliedIPAdapter:
    """An IP-Adapter at work.

    adapter: its handle. embeddings: CLIP image embeddings ``[n, k, E]`` of k pictures that are read together; n = 1 for
    all pictures to make or one for each of the batch. weight: of what is read. start, end: as in `AppliedControl`.
    mask: where it acts, ``[n, H, W]``, 0..1, of the picture's shape; None is everywhere. groups: multiply the weight in
    each group of attention blocks (see `attention_groups`); none are 1 everywhere.
    """

    adapter: StageHandle
    embeddings: Tensor
    weight: float = 1.0
    start: float = 1.0
    end: float = 0.0
    mask: Tensor | None = None
    groups: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_part("IP-Adapter", self.weight, self.start, self.end)
        for weight in self.groups:
            _check_part("IP-Adapter", weight, self.start, self.end)

    def steps(self, times: Sequence[float]) -> tuple[bool, ...]:
        """Whether it acts in the step that begins at each of these times."""
        return _steps(self.weight if any(self.groups or (1,)) else 0, self.start, self.end, times)

    def describe(self) -> str:
        """In words: ``IP-Adapter tiny (bundled) at 0.8 from 1 to 0.5, block groups 1 0 0 1, 25% of the picture``."""
        said = _described(self.adapter, self.weight, self.start, self.end)
        if any(weight != 1 for weight in self.groups):
            said += f", block groups {' '.join(f'{weight:g}' for weight in self.groups)}"
        return said if self.mask is None else f"{said}, {self.mask.mean().item():.0%} of the picture"


def _check_part(what: str, strength: float, start: float, end: float) -> None:
    if not math.isfinite(strength):
        raise ValueError(f"The {what} is applied with {strength}, expected a finite number: 1 is what it learned.")
    if not 1 >= start >= end >= 0:
        raise ValueError(
            f"The {what} acts from {start:g} to {end:g}, expected 1 >= start >= end >= 0: time runs from 1 (noise) to "
            "0 (picture)."
        )


def _steps(strength: float, start: float, end: float, times: Sequence[float]) -> tuple[bool, ...]:
    return tuple(strength != 0 and start + _TIME_TOLERANCE >= t >= end - _TIME_TOLERANCE for t in times)


def _described(handle: StageHandle, strength: float, start: float, end: float) -> str:
    part = "" if (start, end) == (1, 0) else f" from {start:g} to {end:g}"
    return f"{handle.title} at {strength:g}{part}"


# Applying ------------------------------------------------------------------------------------------------------


def apply_control(
    stage_c: StageHandle,
    network: StageHandle,
    control: ControlInput,
    strength: float = 1.0,
    start: float = 1.0,
    end: float = 0.0,
) -> StageHandle:
    """Stage C steered by a ControlNet too, after those that it carries already.

    Raises:
        ValueError: the ControlNet was made for another Stage C, or reads another kind of control.
    """
    check_control(stage_c, network)
    known = network.info.control.get("kind")
    c_in = control_channels(network)
    if (known and known != control.kind) or control.samples.shape[1] != c_in:
        reads = f"reads {CONTROL_KINDS[known].title}, " if known in CONTROL_KINDS else ""
        raise ValueError(
            f"The control is for {CONTROL_KINDS[control.kind].title} with {control.samples.shape[1]} channels, and "
            f"{network.title} {reads}expected {c_in} channels: connect the control of its kind, or load the ControlNet "
            f"for {control.kind}."
        )
    if families_clash(network.family, control.family):
        raise ValueError(
            f"{network.title} and the latent encoder that made the control belong to different families, expected one "
            "for both: choose files of one family in all loaders."
        )
    applied = AppliedControl(network, control.samples, strength, start, end, control.size)
    return replace(stage_c, controls=(*stage_c.controls, applied))


def apply_ip_adapter(
    stage_c: StageHandle,
    adapter: StageHandle,
    embeddings: Tensor,
    weight: float = 1.0,
    start: float = 1.0,
    end: float = 0.0,
    mask: Tensor | None = None,
    groups: Sequence[float] = (),
) -> StageHandle:
    """Stage C that reads pictures through an IP-Adapter too; embeddings ``[n, k, E]``, see `AppliedIPAdapter`.

    mask: a `MASK` ``[n, H, W]``, 1 where it acts; values outside of 0..1 are clamped.

    Raises:
        ValueError: the adapter was made for another Stage C or another image encoder; the mask is none; or there are
            not as many weights as this Stage C has groups of attention blocks.
    """
    check_ip_adapter(stage_c, adapter)
    width = adapter.module.c_image
    if embeddings.ndim != 3 or embeddings.shape[-1] != width:
        raise ValueError(
            f"The picture was encoded to the shape {list(embeddings.shape)} and {adapter.title} reads "
            f"[n, pictures, {width}]: use the image encoder that it was trained with."
        )
    if mask is not None:
        mask = _checked_mask(mask)
    count = len(attention_groups(stage_c.module))
    if groups and len(groups) != count:
        raise ValueError(
            f"{len(groups)} weights of block groups were given and the attention blocks of {stage_c.title} form "
            f"{count} groups, expected one weight for each: leave all of them at 1, or use a Stage C of two levels."
        )
    applied = AppliedIPAdapter(adapter, embeddings, weight, start, end, mask, tuple(map(float, groups)))
    return replace(stage_c, ip_adapters=(*stage_c.ip_adapters, applied))


def combined(embeddings: Tensor, how: str) -> Tensor:
    """Embeddings ``[n, 1, E]`` of n pictures as an `AppliedIPAdapter` takes them.

    how: ``concatenate`` reads all of them for every picture to make (``[1, n, E]``), ``average`` the mean embedding
    (``[1, 1, E]``), ``one each`` picture i for image i of the batch (``[n, 1, E]``).
    """
    if how not in COMBINE:
        raise ValueError(f"Pictures are to be combined by '{how}', expected one of {', '.join(COMBINE)}: choose one.")
    if how == "one each":
        return embeddings
    together = embeddings.reshape(1, -1, embeddings.shape[-1])
    return together.mean(dim=1, keepdim=True) if how == "average" else together


def _checked_mask(mask: Tensor) -> Tensor:
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or not mask.numel():
        raise ValueError(f"The mask of the IP-Adapter is {shape}, expected [batch, height, width]: connect a mask.")
    return mask.detach().float().cpu().clamp(0, 1).reshape(-1, *mask.shape[-2:])


def check_control(stage_c: StageHandle, network: StageHandle) -> None:
    """ValueError where the ControlNet does not fit the residual blocks of this Stage C."""
    ours, theirs = stage_c.expect("stage_c").module, network.expect("controlnet").module
    widths = residual_widths(ours)
    width = theirs.projections[0][2].out_channels
    outside = [block for block in theirs.proj_blocks if block >= len(widths)]
    if not outside and all(widths[block] == width for block in theirs.proj_blocks):
        return
    base = network.info.control.get("base")
    trained = f" (it was trained with {base})" if base else ""
    raise ValueError(
        f"{network.title} steers residual blocks up to number {max(theirs.proj_blocks)} with a width of {width} and "
        f"{stage_c.title} has {len(widths)} of width {' and '.join(map(str, sorted(set(widths))))}, numbered from 0: "
        f"use it with the size of Stage C that it was made for{trained}."
    )


def check_ip_adapter(stage_c: StageHandle, adapter: StageHandle) -> None:
    """ValueError where the IP-Adapter does not fit the attention blocks of this Stage C."""
    try:
        adapter.expect("ip_adapter").module.check(stage_c.expect("stage_c").module)
    except ValueError as error:
        if adapter.stage != "ip_adapter" or stage_c.stage != "stage_c":
            raise
        raise ValueError(f"{adapter.title} does not fit {stage_c.title}: {error}") from error


def residual_widths(model: StageC) -> list[int]:
    """Widths of the residual blocks of a Stage C, in the order in which they run, repeats counted."""
    levels: list[Any] = [*zip(model.down_blocks, model.down_repeat_mappers, strict=True)]
    levels += zip(model.up_blocks, model.up_repeat_mappers, strict=True)
    widths: list[int] = []
    for blocks, mappers in levels:
        once = [block.depthwise.out_channels for block in blocks if isinstance(block, ResBlock)]
        widths += once * (1 + len(mappers))
    return widths


def attention_groups(model: StageC) -> list[int]:
    """How many attention blocks each level of a Stage C has, in the order in which the levels run.

    The release has two levels and so four groups: outer and inner on the way down, inner and outer on the way up.
    """
    levels = (*model.down_blocks, *model.up_blocks)
    return [sum(isinstance(block, AttnBlock) for block in level) for level in levels]


def control_channels(network: StageHandle) -> int:
    """Channels of the control that a ControlNet reads."""
    return next(layer.in_channels for layer in network.module.backbone.modules() if hasattr(layer, "in_channels"))
