"""What the attachments of a Stage C handle become in a run: residuals and pictures, each computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attachments import AppliedControl, AppliedIPAdapter, attention_groups, check_control, check_ip_adapter
from .control import control_picture, inpainting_control
from .denoisers import SteppedAdapter, SteppedControl
from .handles import StageHandle
from .masks import resized_mask
from .threads import threads_for


def stepped_controls(
    stage_c: StageHandle, latent: Tensor, pixels: tuple[int, int], times: Sequence[float]
) -> list[SteppedControl]:
    """The residuals of what acts in a run, each computed once, where Stage C computes.

    latent: ``[B, 16, h, w]``, for its shape. pixels: ``(height, width)`` of the picture to make. times: at which the
    steps begin. ValueError where a control has another batch or shape.
    """
    found = []
    for applied in stage_c.controls:
        acts = applied.steps(times)
        if any(acts):
            control = fitted_control(applied, latent, pixels)
            found.append(SteppedControl(_residuals(stage_c, applied.network, control), applied.strength, acts))
    return found


def stepped_adapters(
    stage_c: StageHandle, latent: Tensor, pixels: tuple[int, int], times: Sequence[float]
) -> list[SteppedAdapter]:
    """The IP-Adapters that act in a run; arguments as in `stepped_controls`.

    ValueError where one has pictures or masks of another batch, or a mask of another shape.
    """
    found = []
    for applied in stage_c.ip_adapters:
        acts = applied.steps(times)
        if not any(acts):
            continue
        check_ip_adapter(stage_c, applied.adapter)
        _check_batch(applied.adapter, "pictures", applied.embeddings, len(latent))
        mask = fitted_mask(applied, stage_c, latent, pixels)
        if mask is not None and not mask.any():
            continue
        embeddings = applied.embeddings.to(applied.adapter.device)
        weight = [applied.weight * group for group in _groups_per_block(stage_c, applied)]
        found.append(SteppedAdapter(applied.adapter.module, embeddings, weight, acts, mask))
    return found


def fitted_mask(
    applied: AppliedIPAdapter, stage_c: StageHandle, latent: Tensor, pixels: tuple[int, int]
) -> Tensor | None:
    """The mask ``[n, rows, columns]`` on Stage C's tokens for a latent ``[B, 16, h, w]``, each the average of what it
    covers; None where it is 1 everywhere.

    Raises:
        ValueError: another batch, or a shape that is not that of the picture to make.
    """
    mask = applied.mask
    if mask is None:
        return None
    _check_batch(applied.adapter, "masks", mask, len(latent))
    _check_shape(f"The mask of {applied.adapter.title}", mask.shape[-2:], latent, pixels)
    mask = resized_mask(mask[:, None], *stage_c.module.token_size(*latent.shape[-2:]))[:, 0]
    return None if bool((mask == 1).all()) else mask


def _groups_per_block(stage_c: StageHandle, applied: AppliedIPAdapter) -> list[float]:
    counts = attention_groups(stage_c.module)
    weights = applied.groups or (1.0,) * len(counts)
    return [weight for weight, count in zip(weights, counts, strict=True) for _ in range(count)]


def fitted_control(applied: AppliedControl, latent: Tensor, pixels: tuple[int, int]) -> Tensor:
    """The control for a latent ``[B, 16, h, w]``: pixels are resized to 32 for each cell, maps stay as they are.

    Raises:
        ValueError: another batch, or a shape that is not that of the picture to make.
    """
    control, (rows, columns) = applied.control, latent.shape[-2:]
    _check_batch(applied.network, "controls", control, len(latent))
    size = applied.size or control.shape[-2:]
    _check_shape(f"The picture behind the control of {applied.network.title}", size, latent, pixels)
    if applied.network.module.bottleneck_mode != "effnet":
        return control
    control = control_picture(control, rows, columns)
    if applied.network.info.control.get("kind") == "inpainting":
        # Resizing has blurred the border of the holes.
        control = inpainting_control(control[:, :3], control[:, 3:])
    return control


def _check_shape(what: str, size: Sequence[int], latent: Tensor, pixels: tuple[int, int]) -> None:
    """ValueError where a picture or mask of `size` ``(height, width)`` has not the shape of the picture to make."""
    (height, width), (rows, columns) = size, latent.shape[-2:]
    # Some scale must take it to this latent, whose sides are rounded up to whole cells.
    least = max((rows - 1) / height, (columns - 1) / width)
    most = min(rows / height, columns / width)
    if least > most * (1 + 1e-6):
        raise ValueError(
            f"{what} is {width} x {height} and the picture to make is {pixels[1]} x {pixels[0]} (a latent of "
            f"{columns} x {rows}), expected the same shape: crop it, or make a picture of its shape."
        )


def _check_batch(handle: StageHandle, what: str, given: Tensor, batch: int) -> None:
    if len(given) not in (1, batch):
        raise ValueError(
            f"{handle.title} was given {len(given)} {what} and {batch} pictures are made, expected 1 or {batch}: give "
            "one for all of them or one for each."
        )


@torch.no_grad()
def _residuals(stage_c: StageHandle, network: StageHandle, control: Tensor) -> list[Tensor | None]:
    """One picture at a time, which needs less memory, and no picture depends on its neighbours."""
    check_control(stage_c, network)
    with threads_for(network):
        parts = [network.module(one.to(network.device, network.dtype)) for one in control.split(1)]
    return [
        None if first is None else torch.cat([part[block] for part in parts]).to(stage_c.device, stage_c.dtype)
        for block, first in enumerate(parts[0])
    ]
