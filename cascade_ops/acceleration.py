"""Ways to run the same model faster, chosen for one stage: recorded steps (`graphs`) and `torch.compile` (`compiling`).

The choice is made on a handle with `accelerated` and acts where the stage samples or decodes. Neither is on by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .checkpoints.errors import STAGE_TITLES
from .compiling import compiled, compiler_missing, compiling
from .graphs import graphs_of
from .handles import StageHandle
from .streaming import streaming_plan

AUTO, CUDA_GRAPH, COMPILE = "auto", "cuda graph", "torch.compile"
METHODS = (AUTO, CUDA_GRAPH, COMPILE)

# `CascadeUNet.step`.
ModelStep = Callable[..., Tensor]


def methods_for(stage: str) -> tuple[str, ...]:
    """What can be asked for a stage: Stage A has no steps to record."""
    return METHODS if stage in ("stage_c", "stage_b") else (AUTO, COMPILE)


@dataclass(frozen=True)
class Acceleration:
    """How a stage runs. model: in place of the handle's. step: in place of the model's own; None is that.

    words: what it does, or why not what was asked for; empty where nothing was asked for.
    """

    model: Any
    step: ModelStep | None = None
    words: str = ""


def accelerated(handle: StageHandle, method: str, device: torch.device | str) -> tuple[StageHandle, str]:
    """The stage with a choice of `METHODS`, and in words what it does on the device where it will run.

    Raises ValueError for a method that is unknown or cannot act there.
    """
    known = methods_for(handle.stage)
    if handle.stage not in ("stage_a", "stage_b", "stage_c"):
        raise ValueError(f"{handle.title} cannot be accelerated, expected a Stage C, B or A: connect one of them.")
    if method not in known:
        raise ValueError(
            f"{STAGE_TITLES[handle.stage]} was to be accelerated by {method!r}, expected {' or '.join(known)}: choose "
            "one of them."
        )
    device = torch.device(device)
    if method == AUTO and (CUDA_GRAPH not in known or device.type != "cuda"):
        reason = (
            f"CUDA graphs need a GPU and it runs on the {device.type}" if CUDA_GRAPH in known else "it has no steps"
        )
        return replace(handle, acceleration=""), (
            f"{handle.title} runs as it always does: {reason}, and torch.compile is never chosen by itself, because "
            "its start-up takes long."
        )
    if method == CUDA_GRAPH and device.type != "cuda":
        raise ValueError(
            f"CUDA graphs were asked for {handle.title}, which runs on the {device.type}, expected a GPU: choose "
            f"{AUTO} or {COMPILE}."
        )
    if method == COMPILE:
        missing = compiler_missing(device)
        if missing:
            raise ValueError(
                f"torch.compile was asked for {handle.title} and lacks {missing}: install it, or choose {AUTO}."
            )
        words = f"{handle.title} is compiled in its first run with each size of picture, which takes long"
    else:
        words = f"{handle.title} records a step for each size of picture as a CUDA graph and replays it"
    return replace(handle, acceleration=method), words


def acceleration_of(handle: StageHandle, windowed: bool = False) -> Acceleration:
    """How a stage runs that was placed where it computes. windowed: Stage B predicts in windows.

    Raises ValueError where the method that was asked for by name cannot act; `auto` then runs plainly and says so.
    """
    method, model = handle.acceleration, handle.module
    if not method:
        return Acceleration(model)
    obstacle = _moved(handle)
    if method == COMPILE:
        if obstacle:
            raise _cannot(handle, method, obstacle)
        return Acceleration(compiled(model), None, "with compiled blocks")
    if not obstacle and windowed:
        obstacle = "it is sampled in windows, whose prediction is put together on the way"
    if not obstacle and handle.reuse is not None:
        obstacle = "its inner blocks are reused from step to step, so that not every step is the same"
    graphs = None if obstacle else graphs_of(model, handle.device)
    if graphs is None:
        obstacle = obstacle or f"it runs on the {handle.device.type}"
    elif graphs.failure:
        obstacle = graphs.failure
    if obstacle and method == CUDA_GRAPH and not (graphs and graphs.failure):
        raise _cannot(handle, method, obstacle)
    if graphs is None or obstacle:
        return Acceleration(model, None, f"without CUDA graphs: {obstacle}")
    return Acceleration(model, partial(graphs.step, model), "with steps replayed as CUDA graphs")


def notes(handle: StageHandle, windowed: bool = False) -> list[str]:
    """In words, for the node that ran it: how it ran, or nothing where nothing was asked for."""
    words = acceleration_of(handle, windowed).words
    return [words] if words else []


def _cannot(handle: StageHandle, method: str, obstacle: str) -> ValueError:
    return ValueError(
        f"{handle.title} was to be accelerated by {method} and cannot be, because {obstacle}: choose {AUTO} for its "
        "acceleration, or change that."
    )


def _moved(handle: StageHandle) -> str:
    """Why a recording or compiled code would read weights that are not there; empty where all of them stay."""
    model = handle.network
    if streaming_plan(model) is not None:
        return "its blocks are streamed from main memory"
    # With its number: what a host says can be without.
    device = torch.empty(0, device=handle.device).device
    if any(tensor.device != device for tensor in chain(model.parameters(), model.buffers())) or any(
        getattr(layer, "comfy_cast_weights", False) for layer in model.modules()
    ):
        return "some of its weights are fetched to the device only when they are read (memory is short there)"
    return ""


@contextmanager
def acting(handle: StageHandle) -> Iterator[None]:
    """Run a stage as `acceleration_of` said."""
    if handle.acceleration != COMPILE:
        yield
        return
    with compiling(handle.title):
        yield
