"""A whole training run: models, data, loop, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..catalog import AUTO
from ..checkpoints.info import MODELS
from . import targets
from .accelerated import default_launch
from .checkpoint import whole
from .data import TrainingData
from .launch import Launch
from .objective import Objective, Report, Trained, TrainingStep
from .parts import Parts
from .samples import Sampler
from .settings import Settings
from .trainer import BatchSource, Trainer

# A run of fewer steps is over before its length is of use.
_WORTH_TIMING = 50


def train(
    settings: Settings,
    *,
    parts: Parts | None = None,
    data: BatchSource | None = None,
    launch: Launch | None = None,
    report: Report = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train what the settings describe, or go on with it, and write the finished files to the run's folder.

    parts: the models to start from, where they are loaded already. data: batches from elsewhere than `settings.data`.
    launch: the processes; by default one, or those of ``accelerate launch``. report: hears of each step in the main
    process. stop: True ends the run after the step, with what was learned so far exported. say: gets lines for people,
    such as which pictures were skipped.

    Raises:
        ValueError: settings, models or data that do not fit.
        FloatingPointError: the loss became infinite or no number.
    """
    launch = launch or default_launch(settings.precision)
    quiet = say if launch.index == 0 else (lambda line: None)
    parts = parts or Parts(settings.models, frozen_dtype=settings.precision)
    settings = with_init_found(settings, parts)
    objective = targets.build(settings, parts)
    if data is None:
        # The first process fills the cache that the others then read.
        if launch.index != 0:
            launch.wait()
        data = TrainingData.open(settings, objective.needs, parts, quiet, launch.device)
        if launch.index == 0:
            launch.wait()
    sampler = Sampler(settings, parts, Path(settings.output))

    def after(step: TrainingStep) -> None:
        report(step)
        if sampler.due(step.step):
            with trainer.average.in_place():
                for path in sampler.write(objective, step.step):
                    quiet(f"Wrote {path}.")

    trainer = Trainer(objective, data, settings, launch, after, stop)
    if settings.samples.every and is_spread(trainer):
        raise ValueError(
            f"samples.every is {settings.samples.every} and the weights are spread over {launch.processes} processes "
            "(FSDP), expected 0: sample from the finished files, or train with DDP."
        )
    left = settings.steps - trainer.step
    if left >= _WORTH_TIMING:
        seconds = trainer.seconds_per_step()
        quiet(f"{left} steps of about {seconds:.2g} s: {duration(left * seconds)}.")
    finished = trainer.run()
    files: list[Path] = []
    with trainer.average.in_place():
        whole = _whole(trainer, settings, parts)
        if launch.index == 0 and whole is not None:
            whole.to("cpu").eval()
            files = whole.export(Path(settings.output), settings.name or settings.target)
    launch.wait()
    return Trained(files, trainer.step, trainer.losses, objective, finished)


def with_init_found(settings: Settings, parts: Parts) -> Settings:
    """The settings with the file that `models.init` ``auto`` means.

    Raises:
        ValueError: the target is an adapter, for which no file is the best one.
    """
    if settings.models.init != AUTO:
        return settings
    if settings.target not in MODELS:
        raise ValueError(
            f"models.init is auto for {settings.target}, expected a file to go on with, or none for a new one: name it."
        )
    return replace(settings, models=replace(settings.models, init=str(parts.path(settings.target))))


def duration(seconds: float) -> str:
    """A length of time in words, in the two largest units that it has."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    return f"about {hours} h {minutes - 60 * hours} min" if hours else f"about {minutes} min"


def is_spread(trainer: Trainer) -> bool:
    """Whether each process has a part of the weights only (FSDP2)."""
    return any(hasattr(parameter, "full_tensor") for parameter in trainer.parameters.values())


def _whole(trainer: Trainer, settings: Settings, parts: Parts) -> Objective | None:
    """The objective with its weights in one piece, in the main process; all processes must call it."""
    if not is_spread(trainer):
        return trainer.objective
    weights = {name: whole(parameter) for name, parameter in trainer.parameters.items()}
    if trainer.launch.index != 0:
        return None
    objective = targets.build(settings, parts)
    objective.load_state_dict(weights, strict=False)
    objective.load_state(trainer.objective.state())
    return objective
