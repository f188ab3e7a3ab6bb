"""Stages in ComfyUI's hands: each one's weights in one model patcher, so that ComfyUI loads, offloads and frees them.

A patcher lives as long as the handle's weights are on a wire or in ComfyUI's cache, and no longer.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from ..cascade_ops.text import TextEncoder
from .comfyui_layers import comfyui_layer, rebuilt
from .runtime_comfyui import places

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle


class StableCascadeModel(nn.Module):
    """What a patcher holds; its name is what ComfyUI logs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


@dataclass(frozen=True)
class Managed:
    """A patcher, and the network that runs on its weights; None where that is the handle's own."""

    patcher: Any
    network: nn.Module | None


# By the handle's network. No value may refer to its key, or neither would ever be freed.
_managed: WeakKeyDictionary[nn.Module, Managed] = WeakKeyDictionary()


def new_patcher(model: nn.Module, stage: str) -> Any:
    """A patcher of the class that this ComfyUI uses, which can change after its start."""
    patchers = importlib.import_module("comfy.model_patcher")
    run, wait = places(stage)
    return getattr(patchers, "CoreModelPatcher", patchers.ModelPatcher)(model, load_device=run, offload_device=wait)


def manage(handle: StageHandle, patcher: Any, network: nn.Module | None) -> None:
    """Let `patcher` move the weights of `handle` from now on; `network` runs on them, None is the handle's own."""
    _managed[handle.network] = Managed(patcher, network)


def managed(handle: StageHandle) -> Managed:
    """The patcher of a handle, made where there is none."""
    if handle.network not in _managed:
        network = rebuilt(handle.network, comfyui_layer)
        manage(handle, new_patcher(StableCascadeModel(network), handle.stage), network)
    return _managed[handle.network]


def placed(handles: Sequence[StageHandle], memory: int) -> list[StageHandle]:
    """The stages, loaded together and with `memory` bytes to spare as far as there are; for one run of a node."""
    found = [managed(handle) for handle in handles]
    management = importlib.import_module("comfy.model_management")
    management.load_models_gpu([entry.patcher for entry in found], memory_required=memory)
    return [_running(handle, entry) for handle, entry in zip(handles, found, strict=True)]


def _running(handle: StageHandle, entry: Managed) -> StageHandle:
    device = entry.patcher.load_device
    network = entry.network or handle.network
    if isinstance(handle.module, TextEncoder):
        return replace(handle, module=handle.module.with_module(network, device), runs_on=device)
    return replace(handle, module=network, runs_on=device)
