"""The fast ways of ours that a GPU has, beside the plain one: steps replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..cascade_ops.acceleration import CUDA_GRAPH, accelerated
from ..cascade_ops.graphs import graphs_of
from ..cascade_ops.pipeline import CascadePipeline

NAME = "with CUDA graphs"


def replayed_step(model: nn.Module, device: torch.device) -> Callable[..., Any] | None:
    """In place of the model's `step`; None where nothing can be recorded. ValueError where recording failed."""
    graphs = graphs_of(model, device)
    if graphs is None:
        return None

    def step(*arguments: Any, **named: Any) -> Any:
        if graphs.failure:
            raise ValueError(f"The step could not be recorded as a CUDA graph: {graphs.failure}.")
        return graphs.step(model, *arguments, **named)

    return step


def replayed_pipeline(pipeline: CascadePipeline, device: torch.device) -> CascadePipeline | None:
    """The same stages, sampled with CUDA graphs; None where nothing can be recorded."""
    if device.type != "cuda":
        return None
    chosen = partial(accelerated, method=CUDA_GRAPH, device=device)
    return replace(pipeline, stage_c=chosen(pipeline.stage_c)[0], stage_b=chosen(pipeline.stage_b)[0])
