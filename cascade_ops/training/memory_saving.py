"""Gradient checkpointing: activations are computed again on the way back instead of being kept."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models.layers import AttnBlock, FeedForwardBlock, ResBlock


def checkpoint_blocks(module: nn.Module, enabled: bool = True) -> int:
    """Let every residual, attention and feed-forward block keep its input only (Chen et al., "Training Deep Nets with
    Sublinear Memory Cost", 2016); returns how many. Results are the same, a step takes about a third longer.
    """
    if not enabled:
        return 0
    blocks = [block for block in module.modules() if isinstance(block, ResBlock | AttnBlock | FeedForwardBlock)]
    for block in blocks:
        # An attribute of the instance hides the method and leaves names and weights as they are.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return len(blocks)
