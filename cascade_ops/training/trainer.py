"""The training loop that every target shares: seeded, resumable, on one process or many.

A run depends on its settings alone. The random numbers of a sample come from the seed, the step and the sample's place
in the batch (`draws.Draws`), the batches from the seed and the step; so a run that was stopped and resumed, or spread
over several processes, is the run that went through on one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checkpoint
from .average import WeightAverage
from .draws import Draws
from .launch import Launch
from .objective import Batch, Objective, StepResult, TrainingStep, trained_parameters
from .optimizers import learning_rate, make_optimizer
from .settings import Settings

# Settings that a resumed run may change without becoming another run.
_MAY_CHANGE = {"output", "name", "steps", "save_every", "log_every", "tensorboard", "samples"}


class BatchSource(Protocol):
    """Where batches come from; `data.TrainingData` is one."""

    def batches(
        self, first_step: int, last_step: int, global_batch: int, positions: Sequence[int]
    ) -> Iterable[Batch]: ...


class Trainer:
    """Trains the parameters of an objective that require a gradient.

    folder: of the run; its ``checkpoint.safetensors`` is gone on with if it is there. report: called after each step in
    the main process. stop: asked after each step; True ends the run there, with everything saved.
    """

    def __init__(
        self,
        objective: Objective,
        data: BatchSource,
        settings: Settings,
        launch: Launch,
        report: Callable[[TrainingStep], None] = lambda step: None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.objective, self.data, self.settings, self.launch = objective, data, settings, launch
        self.report, self.stop = report, stop
        self.path = Path(settings.output) / checkpoint.FILE_NAME
        self.step, self.losses = 0, []
        objective.to(launch.device)
        if not trained_parameters(objective):
            raise ValueError(f"Nothing is trained: no parameter of {type(objective).__name__} asks for a gradient.")
        optimizer = make_optimizer(trained_parameters(objective), settings.optimizer)
        self.wrapped, prepared = launch.prepare(objective, optimizer)
        self.optimizer = prepared
        # Some wrappers replace the parameters.
        self.parameters = trained_parameters(objective)
        self.average = WeightAverage(self.parameters, settings.optimizer.ema)
        if self.path.exists():
            self.resume()

    @property
    def global_batch(self) -> int:
        """Samples per step, of all processes."""
        return self.settings.batch_size * self.launch.processes * self.settings.optimizer.accumulation

    def positions(self) -> list[int]:
        """The places of this process's samples in the whole batch of a step."""
        own = self.settings.batch_size * self.settings.optimizer.accumulation
        return list(range(self.launch.index * own, (self.launch.index + 1) * own))

    def run(self) -> bool:
        """Train to the last step, saving on the way and at the end; False where `stop` ended it before.

        Raises:
            FloatingPointError: a loss is not finite; names the step and the samples. The checkpoint before it stays.
        """
        settings, positions = self.settings, self.positions()
        batches = iter(self.data.batches(self.step, settings.steps, self.global_batch, positions))
        while self.step < settings.steps:
            self._train_step(next(batches), positions)
            last = self.step == settings.steps
            stopped = not last and self._all_stop()
            if last or stopped or (settings.save_every and self.step % settings.save_every == 0):
                self.save()
            if stopped:
                return False
        return True

    def _train_step(self, batch: Batch, positions: list[int]) -> None:
        settings = self.settings
        rate = learning_rate(self.step, settings.steps, settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.at(self.step, settings.steps)
        # What a model draws by itself, such as dropout.
        torch.manual_seed((settings.seed * 1_000_003 + self.step) * 4_099 + self.launch.index)
        results = self._gradients(batch, positions)
        if settings.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), settings.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.step)
        self.step += 1
        self._tell(results, rate)

    def _gradients(self, batch: Batch, positions: list[int]) -> list[StepResult]:
        """Add the gradients of a step's batches to the parameters."""
        settings, results = self.settings, []
        parts = settings.optimizer.accumulation
        for number, (part, places) in enumerate(zip(split(batch, parts), chunks(positions, parts), strict=True)):
            part = to_device(part, self.launch.device)
            draws = Draws(settings.seed, self.step, places)
            with self.launch.accumulating(self.wrapped, last=number == parts - 1):
                with self.launch.autocast():
                    result = self.wrapped(part, draws)
                self._check_finite(result, part)
                self.launch.backward(result.loss / parts)
            results.append(result)
        return results

    def seconds_per_step(self) -> float:
        """How long a step takes here, from two that change nothing; all processes must call it."""
        positions = self.positions()
        batch = next(iter(self.data.batches(self.step, self.step + 1, self.global_batch, positions)))
        own = {name: value.clone() for name, value in self.objective.state().items()}
        buffers = {name: buffer.clone() for name, buffer in self._buffers().items()}
        self.objective.at(self.step, self.settings.steps)
        seconds = 0.0
        for _ in range(2):  # the first one also sets things up
            started = time.monotonic()
            self._gradients(batch, positions)
            self.launch.wait()
            if self.launch.device.type == "cuda":
                torch.cuda.synchronize(self.launch.device)
            seconds = time.monotonic() - started
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.load_state(own)
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                buffer.copy_(buffers[name])
        return seconds

    def _tell(self, results: list[StepResult], rate: float) -> None:
        """Gather what all processes saw; the objective learns from it, the log and the caller hear of it."""
        loss = self._mean([result.loss for result in results])
        figures = {name: self._mean([result.figures[name] for result in results]) for name in results[0].figures}
        error = log_snr = None
        if results[0].error is not None:
            error = self.launch.gather(torch.cat([result.error for result in results]).detach().float()).cpu()
            levels = torch.cat([result.log_snr for result in results]).float()
            log_snr = self.launch.gather(levels.to(self.launch.device)).cpu()
            self.objective.observe(log_snr, error)
        self.losses.append(loss)
        if self.launch.index == 0:
            self.report(TrainingStep(self.step, self.settings.steps, loss, rate, error, log_snr, figures))

    def _mean(self, values: list[Tensor]) -> float:
        values = [torch.as_tensor(value).detach().float().to(self.launch.device) for value in values]
        return self.launch.gather(torch.stack(values).mean()[None]).mean().item()

    def _check_finite(self, result: StepResult, part: Batch) -> None:
        finite = torch.isfinite(result.loss.detach()).float()
        if bool(self.launch.gather(finite[None]).all()):
            return
        names = part.get("name", [])
        if result.error is not None and len(names):
            names = [name for name, fine in zip(names, result.error.isfinite().tolist(), strict=True) if not fine]
        where = f" (samples {', '.join(map(str, names))})" if len(names) else ""
        raise FloatingPointError(
            f"The loss at step {self.step} is {result.loss.item()}{where}, expected a finite number: lower the "
            f"learning rate or take these samples out, and go on from the checkpoint in {self.path.parent}."
        )

    def _all_stop(self) -> bool:
        wanted = torch.tensor([float(self.stop())], device=self.launch.device)
        return bool(self.launch.gather(wanted).any())

    def save(self) -> None:
        """Write the run to its checkpoint, atomically; all processes must call it."""
        state = checkpoint.RunState(
            self.step,
            weights={name: checkpoint.whole(p) for name, p in self.parameters.items()},
            buffers={name: checkpoint.whole(b) for name, b in self._buffers().items()},
            average={name: checkpoint.whole(value) for name, value in self.average.values.items()},
            optimizer=checkpoint.optimizer_state(plain(self.optimizer), self.parameters),
            own=self.objective.state(),
            losses=self.losses,
            settings=fixed_settings(self.settings, self.launch),
        )
        if self.launch.index == 0:
            checkpoint.write(self.path, state)
        self.launch.wait()

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the checkpoint.

        Raises:
            ValueError: it was made with other settings; names the first one that differs.
        """
        state = checkpoint.read(self.path)
        check_same_run(state.settings, fixed_settings(self.settings, self.launch), self.path)
        if state.weights.keys() != self.parameters.keys():
            raise ValueError(
                f"{self.path} trained {len(state.weights)} tensors and this run trains {len(self.parameters)}, "
                "expected the same ones: choose another output folder."
            )
        self.step, self.losses = state.step, state.losses
        for name, parameter in self.parameters.items():
            parameter.copy_(checkpoint.laid_out_as(state.weights[name], parameter))
        for name, buffer in self._buffers().items():
            buffer.copy_(state.buffers[name])
        for name, value in self.average.values.items():
            value.copy_(checkpoint.laid_out_as(state.average[name], value))
        checkpoint.restore_optimizer(plain(self.optimizer), self.parameters, state.optimizer)
        self.objective.load_state(state.own)

    def _buffers(self) -> dict[str, Tensor]:
        kept = self.objective.state_dict().keys()
        return {name: buffer for name, buffer in self.objective.named_buffers() if name in kept}


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def fixed_settings(settings: Settings, launch: Launch) -> dict[str, Any]:
    """The settings that make a run what it is; of batch size, processes and accumulation only the product counts."""
    values = {name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE}
    optimizer = dict(values["optimizer"])
    values["batch_size"] *= launch.processes * optimizer.pop("accumulation")
    values["optimizer"] = optimizer
    values["data"] = {name: value for name, value in values["data"].items() if name not in ("workers", "cache_folder")}
    import json

    return json.loads(json.dumps(values))  # tuples as they come back from a file


def check_same_run(before: dict[str, Any], now: dict[str, Any], path: Path, prefix: str = "") -> None:
    """ValueError where a setting is not what the checkpoint was made with."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            check_same_run(old, new, path, f"{prefix}{name}.")
        elif old != new:
            raise ValueError(
                f"The run in {path.parent} was made with {prefix}{name} {old!r} and is asked to go on with {new!r}, "
                "expected the same: set it back, or choose another output folder."
            )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors, and those in its dicts, on a device."""
    return {
        name: to_device(value, device)
        if isinstance(value, dict)
        else value.to(device, non_blocking=True)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in `parts` of equal length."""
    for number in range(parts):
        yield {
            name: next(piece for i, piece in enumerate(split(value, parts)) if i == number)
            if isinstance(value, dict)
            else value[len(value) * number // parts : len(value) * (number + 1) // parts]
            for name, value in batch.items()
        }


def chunks(values: list[int], parts: int) -> list[list[int]]:
    """A list in `parts` of equal length."""
    size = len(values) // parts
    return [values[number * size : (number + 1) * size] for number in range(parts)]
