"""A new ControlNet: as large as its Stage C asks for, starting from the latent encoder, changing nothing yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..control import ControlKind
from ..control.start import calibrate_batch_norms, start_from_encoder
from ..models import ControlNet, LatentEncoder, StageC
from ..models.controlnet import default_proj_blocks, residual_blocks


def new_controlnet(
    kind: ControlKind,
    stage_c: StageC,
    network: Mapping,
    encoder: LatentEncoder | None = None,
    embedding_width: int | None = None,
) -> tuple[ControlNet, dict]:
    """A ControlNet of this kind for this Stage C that changes nothing yet, and its constructor's arguments.

    For the published Stage C and encoder it has the published size; otherwise it shrinks or grows with them.

    Args:
        network: arguments to have otherwise: ``proj_blocks``, ``widths``, ``depths``, ``large_widths``,
            ``large_blocks``.
        encoder: Stage C's latent encoder, which an ``effnet`` bottleneck starts from.
        embedding_width: of the face embeddings, for identity.

    Raises:
        ValueError: an argument of another name, or a steered block that Stage C does not have.
    """
    blocks = residual_blocks(stage_c)
    width = stage_c_width(stage_c)
    channels = {"super_resolution": stage_c.embedding[1].in_channels // stage_c.patch_size**2}
    channels["identity"] = embedding_width or kind.channels
    every = kind.name == "identity"  # the reference steers all of them by the identity
    config: dict = {
        "c_in": channels.get(kind.name, kind.channels),
        "c_proj": width,
        "proj_blocks": list(range(blocks)) if every else list(default_proj_blocks(blocks)),
        "bottleneck_mode": kind.bottleneck,
    }
    if kind.bottleneck == "effnet" and encoder is not None:
        config |= _encoder_sizes(encoder)
    if kind.bottleneck == "large":
        # The published proportions: 16384, 1024 and 1280 for a Stage C 2048 wide.
        config |= {"large_widths": [8 * width, width // 2, 5 * width // 8], "large_blocks": 8}
    allowed = [name for name in ("proj_blocks", "widths", "depths", "large_widths", "large_blocks") if name in config]
    unknown = [name for name in network if name not in allowed]
    if unknown:
        raise ValueError(
            f"network has {unknown[0]!r}, expected arguments of a ControlNet for {kind.name}: {', '.join(allowed)}."
        )
    config |= network
    check_blocks(config["proj_blocks"], blocks)
    controlnet = ControlNet(**config)
    if kind.bottleneck == "effnet":
        new = encoder is None or start_from_encoder(controlnet, encoder)
        # Lines on black look like no picture that the encoder has seen: with its statistics, all of them look the same.
        if new or kind.name == "canny":
            calibrate_batch_norms(controlnet)
    return controlnet, config


def stage_c_width(stage_c: StageC) -> int:
    """The one width of all levels; ValueError where they differ."""
    widths = set(stage_c.c_hidden)
    if len(widths) > 1:
        raise ValueError(
            f"Stage C has levels of different widths ({', '.join(map(str, stage_c.c_hidden))}), expected one width, "
            "as in every release: a ControlNet's residuals have one."
        )
    return widths.pop()


def _encoder_sizes(encoder: LatentEncoder) -> dict:
    """Widths and depths of the encoder's own network."""
    convolutions = [[m for m in group.modules() if isinstance(m, nn.Conv2d)][-1] for group in encoder.backbone]
    return {
        "widths": [convolution.out_channels for convolution in convolutions],
        "depths": [len(group) for group in list(encoder.backbone)[1:-1]],
    }


def check_blocks(proj_blocks: Sequence[int], blocks: int) -> None:
    """ValueError where a steered block is none of Stage C's `blocks` ones."""
    if proj_blocks and max(proj_blocks) >= blocks:
        raise ValueError(
            f"The ControlNet steers residual block {max(proj_blocks)} and Stage C has {blocks} (from 0): choose a "
            "ControlNet for this Stage C, or other proj_blocks."
        )
