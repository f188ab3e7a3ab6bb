"""A model's step recorded once per shape and replayed: one launch in place of a thousand.

A small latent keeps a GPU busy for less time than Python needs to ask for its work. A CUDA graph holds all the launches
of a step with the addresses that they read and write, so that a replay costs the host next to nothing. What differs
between two steps (the latent, the noise level) and between two runs (the conditions) is copied to fixed buffers first.

The first step of a new shape runs as it always does, which also warms the libraries up; the second is recorded. So a
shape that comes once is never recorded. Source: PyTorch's notes on CUDA graphs (`torch.cuda.graph`).
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .models import Prepared
from .models.unet import ControlResiduals

Run = Callable[[], Tensor]

# Shapes kept for one model. A run has one for each combination of guided or not and of the controls and adapters that
# act; each holds a copy of its conditions (89 MB for a guided run of the 3.6B Stage C in bfloat16 with 85 tokens).
SHAPES_KEPT = 4


class Recorder(Protocol):
    """What records on a device; the tests have one that needs none."""

    def warm_up(self, run: Run) -> Tensor:
        """Run it as it is, where the next recording will be made."""

    def capture(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """Record `run`, which reads fixed buffers: what runs it again, and where each time its result will be.

        Raises RuntimeError for what cannot be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs. All recordings share one memory pool: each result is copied before another one runs."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Run) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def capture(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # A host's other threads may use the device meanwhile.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), recording:
            result = run()
        return graph.replay, result


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device; None where nothing can."""
    return CudaRecorder(device) if device.type == "cuda" else None


class StepGraphs:
    """The recorded steps of one model.

    The model is given at each call and not kept, so that it can be freed. failure: why nothing is recorded any more.
    """

    def __init__(self, recorder: Recorder, kept: int = SHAPES_KEPT):
        self.failure = ""
        self._recorder, self._kept = recorder, kept
        self._recorded: OrderedDict[Hashable, _RecordedStep] = OrderedDict()

    @property
    def shapes(self) -> int:
        """How many are kept."""
        return len(self._recorded)

    def step(
        self, model: Any, x: Tensor, prepared: Prepared, index: int, control: ControlResiduals | None = None
    ) -> Tensor:
        """The model's own `step`, see `CascadeUNet.step`: the same prediction, in a tensor of the caller's own.

        Where recording fails, it says so in one warning and runs as it always does from then on.
        """
        if self.failure or model.training:
            return _plain(model, x, prepared, index, control)
        # A host may be in inference mode now and not in the next run; what is kept has to serve both.
        with torch.inference_mode(False), torch.no_grad():
            try:
                key = _key(x, prepared, control)
                step = self._recorded.get(key)
                if step is None:
                    step = self._recorded[key] = _RecordedStep(x, prepared, control)
                    if len(self._recorded) > self._kept:
                        self._recorded.popitem(last=False)
                self._recorded.move_to_end(key)
                step.load(x, prepared, index, control)
                return step.run(self._recorder, model)
            except (_CannotRecordError, torch.cuda.OutOfMemoryError) as problem:
                self.failure = str(problem).split("\n", 1)[0]
                self._recorded.clear()
        warnings.warn(
            f"{type(model).__name__} could not be recorded as a CUDA graph ({self.failure}) and runs without: the "
            "picture is the same; choose no acceleration for it to be rid of this message.",
            stacklevel=2,
        )
        return _plain(model, x, prepared, index, control)


class _CannotRecordError(Exception):
    """Why not, in a few words."""


class _RecordedStep:
    """One shape: the buffers that its recording reads, and the recording once there is one."""

    def __init__(self, x: Tensor, prepared: Prepared, control: ControlResiduals | None):
        dtypes = {modulation.dtype for modulation in prepared.modulations}
        if len(dtypes) != 1:
            raise _CannotRecordError(f"its modulations are of {len(dtypes)} dtypes")
        self._x = torch.empty_like(x)
        sizes = [modulation[0].numel() for modulation in prepared.modulations]
        self._row = torch.empty(sum(sizes), dtype=dtypes.pop(), device=x.device)
        modulations = tuple(
            part.view(1, *modulation.shape[1:])
            for part, modulation in zip(self._row.split(sizes), prepared.modulations, strict=True)
        )
        self._conditions: list[Tensor] = []

        def buffer(tensor: Tensor) -> Tensor:
            self._conditions.append(torch.empty_like(tensor))
            return self._conditions[-1]

        conditions, self._control = _mapped((_without_modulations(prepared), control), buffer)
        self._prepared = replace(conditions, modulations=modulations)
        self._held: list[weakref.ref[Tensor]] = []
        self._table = self._row[None]
        self._levels: list[weakref.ref[Tensor]] = []
        self._warm = False
        self._replay: Callable[[], None] | None = None
        self._result = x

    def load(self, x: Tensor, prepared: Prepared, index: int, control: ControlResiduals | None) -> None:
        """Fill the buffers for a step; conditions that lie there since the step before are not copied again."""
        given: list[Tensor] = []
        _mapped((_without_modulations(prepared), control), given.append)
        if not _same(self._held, given):
            for place, (mine, its) in enumerate(zip(self._conditions, given, strict=True)):
                if not self._held or self._held[place]() is not its:
                    mine.copy_(its)
            self._held = [weakref.ref(each) for each in given]
        if not _same(self._levels, prepared.modulations):
            self._table = torch.cat([modulation.flatten(1) for modulation in prepared.modulations], dim=1)
            self._levels = [weakref.ref(each) for each in prepared.modulations]
        self._row.copy_(self._table[index])
        self._x.copy_(x)

    def run(self, recorder: Recorder, model: Any) -> Tensor:
        """The prediction for what lies in the buffers."""

        def run() -> Tensor:
            return _plain(model, self._x, self._prepared, 0, self._control)

        if not self._warm:
            self._warm = True
            return recorder.warm_up(run)
        if self._replay is None:
            try:
                self._replay, self._result = recorder.capture(run)
            except RuntimeError as error:
                raise _CannotRecordError(str(error)) from error
        self._replay()
        # The next replay writes to the same place.
        return self._result.clone()


def _plain(model: Any, x: Tensor, prepared: Prepared, index: int, control: ControlResiduals | None) -> Tensor:
    # Stage B in windows takes no control.
    return model.step(x, prepared, index) if control is None else model.step(x, prepared, index, control)


def _same(held: Sequence[weakref.ref[Tensor]], given: Sequence[Tensor]) -> bool:
    return len(held) == len(given) and all(ref() is each for ref, each in zip(held, given, strict=True))


def _without_modulations(prepared: Prepared) -> Prepared:
    return replace(prepared, modulations=())


def _key(x: Tensor, prepared: Prepared, control: ControlResiduals | None) -> Hashable:
    """What a recording depends on: all shapes but the number of levels, and what is no tensor by its value."""
    levels = tuple((modulation.shape[1:], modulation.dtype) for modulation in prepared.modulations)
    return _shape((x, _without_modulations(prepared), control)), levels


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if is_dataclass(value):
        return type(value), *(_shape(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple | list):
        return tuple(map(_shape, value))
    return value


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same value with what `change` makes of each tensor in it; always in the same order."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    if isinstance(value, tuple | list):
        return tuple(_mapped(each, change) for each in value)
    return value


# By model. No value may refer to its key, or neither would ever be freed.
_graphs: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], StepGraphs]] = weakref.WeakKeyDictionary()


def _addresses(model: nn.Module) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))


def graphs_of(model: nn.Module, device: torch.device) -> StepGraphs | None:
    """The recorded steps of a model, kept as long as it lives and its weights lie where they lay; None where nothing
    can be recorded on the device."""
    addresses = _addresses(model)
    for other, (recorded, _) in list(_graphs.items()):
        if _addresses(other) != recorded:
            del _graphs[other]  # it would never be replayed again, and holds memory of the device
    found = _graphs.get(model)
    if found is None:
        recorder = recorder_for(device)
        if recorder is None:
            return None
        found = _graphs[model] = addresses, StepGraphs(recorder)
    return found[1]
