"""A run on disk: everything that going on needs, in one safetensors file that is replaced as a whole.

Tensors are ``module.<name>`` (trained weights), ``buffer.<name>``, ``average.<name>``, ``optimizer.<key>.<name>``,
``state.<name>`` (the objective's own) and ``losses``; the metadata has the step, the settings, and the optimiser's
plain numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoints.saving import write_tensors

FILE_NAME = "checkpoint.safetensors"


@dataclass
class RunState:
    """What `write` stores and `read` gives back, by name; optimizer: key -> parameter's name -> value."""

    step: int
    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def write(path: Path, state: RunState) -> None:
    """Write a run's state; the file that was there stays until the new one is whole."""
    tensors: dict[str, Tensor] = {"losses": torch.tensor(state.losses, dtype=torch.float64)}
    for prefix, group in _groups(state):
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in group.items()}
    numbers: dict[str, dict[str, float]] = {}
    for key, values in state.optimizer.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
            elif value is not None:
                numbers.setdefault(key, {})[name] = value
    metadata = {
        "cascade.run": json.dumps({"step": state.step, "optimizer": numbers}),
        "cascade.settings": json.dumps(state.settings),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: _entry(tensor) for name, tensor in tensors.items()}, metadata)


def read(path: Path) -> RunState:
    """Read what `write` wrote.

    Raises:
        ValueError: the file is no checkpoint of a run.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            run = json.loads(metadata["cascade.run"])
            settings = json.loads(metadata["cascade.settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # safetensors has an exception class of its own for each kind of damage
        raise ValueError(
            f"{path} is not the checkpoint of a training run ({error}), expected one that `cascade train` wrote: "
            "delete it to begin again, or choose another output folder."
        ) from error
    state = RunState(run["step"], optimizer=run["optimizer"], settings=settings)
    state.losses = tensors.pop("losses").tolist()
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix == "optimizer":
            key, _, parameter = rest.partition(".")
            state.optimizer.setdefault(key, {})[parameter] = tensor
        else:
            dict(_groups(state))[prefix][rest] = tensor
    return state


def _groups(state: RunState) -> list[tuple[str, dict[str, Tensor]]]:
    return [("module", state.weights), ("buffer", state.buffers), ("average", state.average), ("state", state.own)]


def _entry(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]:
    return tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().cpu()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in one piece: gathered from all processes if it is spread over them (FSDP2)."""
    gather = getattr(tensor, "full_tensor", None)
    return gather().cpu() if gather else tensor.detach()


def laid_out_as(tensor: Tensor, reference: Tensor) -> Tensor:
    """`tensor` where and how `reference` lies: on its device, or spread over the processes as it is."""
    placements = getattr(reference, "placements", None)
    if placements is None:
        return tensor.to(reference.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, placements)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict]:
    """What the optimiser knows of each parameter: key -> parameter's name -> value."""
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found.setdefault(key, {})[name] = whole(value) if isinstance(value, Tensor) else value
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give the optimiser back what `optimizer_state` took."""
    for key, values in state.items():
        for name, value in values.items():
            parameter = parameters[name]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value = laid_out_as(value, parameter)
            elif isinstance(value, Tensor) and key != "step":  # a step counter stays where PyTorch keeps it
                value = value.to(parameter.device)
            optimizer.state[parameter][key] = value
