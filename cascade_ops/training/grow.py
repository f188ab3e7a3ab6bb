"""Start a deeper network from the weights of a shallower one, so that it does at first what that one does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models.layers import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock
from ..models.unet import CascadeUNet

_BLOCKS = (ResBlock, TimestepBlock, AttnBlock, FeedForwardBlock)


def start_from(module: CascadeUNet, state: Mapping[str, Tensor]) -> list[str]:
    """Load `state`, of a network with as many or fewer blocks per level, into `module` (Stage B or C).

    Blocks that `state` lacks are the last ones of their level. They start as the identity: what they add to their input
    is multiplied by zeros, so that the output stays the same to the bit, and their inner weights keep their random
    start, so that they can learn (Chen et al., "Net2Net", 2016; zero-initialised residual branches as in Goyal et al.
    2017).

    Returns:
        The names of the blocks that are new, such as ``down_blocks.2.3``.

    Raises:
        ValueError: a tensor has another shape, has no place in `module`, or is missing outside a new block.
    """
    wanted = module.state_dict()
    known = {name for name in state if name in wanted}
    unknown = sorted(set(state) - known)
    if unknown:
        raise ValueError(
            f"The file has '{unknown[0]}' ({len(unknown)} such tensors), which the network has no place for; expected "
            "as many or fewer blocks per level than the network: make the network at least as deep as the file's."
        )
    for name in sorted(known):
        found, asked = list(state[name].shape), list(wanted[name].shape)
        if found != asked:
            raise ValueError(
                f"The file's '{name}' has the shape {found}, the network's {asked}; a network can only grow in depth: "
                "keep the widths of the file."
            )
    new = {
        name: block
        for name, block in module.named_modules()
        if isinstance(block, _BLOCKS) and not any(key.startswith(f"{name}.") for key in known)
    }
    missing = [name for name in wanted if name not in known and not name.startswith(tuple(f"{b}." for b in new))]
    if missing:
        raise ValueError(
            f"The file lacks '{missing[0]}' ({len(missing)} such tensors), which is not part of a new block: choose a "
            "whole file of the same stage."
        )
    module.load_state_dict({name: state[name] for name in known}, strict=False)
    for block in new.values():
        _make_identity(block)
    return list(new)


@torch.no_grad()
def _make_identity(block: nn.Module) -> None:
    if isinstance(block, TimestepBlock):
        parameters = list(block.parameters())
    elif isinstance(block, AttnBlock):
        parameters = list(block.attention["attn"].out_proj.parameters())
    else:
        parameters = list(block.channelwise[-1].parameters())
    for parameter in parameters:
        parameter.zero_()
