"""The model that a run trains: from a file, grown from one, or new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import load
from ..models import StageB, StageC
from .grow import start_from
from .networks import sized_network
from .settings import Settings

_CLASSES = {"stage_b": StageB, "stage_c": StageC}


def trained_model(settings: Settings, stage: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The module to train in float32 and training mode, its constructor arguments, and its sampling defaults.

    With `models.init` it starts from that file; with `network` as well, it has that file's network with those
    arguments changed, and grows (see `grow.start_from`). With `network` alone it starts from random weights.
    """
    init, network = settings.models.init, dict(settings.network)
    if init == "none":
        config = sized_network(stage, network)
        torch.manual_seed(settings.seed)
        module, defaults = _CLASSES[stage](**config), {}
    else:
        source, info = load(Path(init), stage, dtype=torch.float32)
        config, defaults = {**info.config, **sized_network(stage, network)}, dict(info.defaults)
        module = source
        if network:
            torch.manual_seed(settings.seed)
            module = _CLASSES[stage](**config)
            start_from(module, source.state_dict())
    return module.train().requires_grad_(True), config, defaults
