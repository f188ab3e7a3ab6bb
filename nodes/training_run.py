"""Runs a training inside a node: in the host's memory, with its progress bar, and with its button to stop.

Hosts execute nodes in PyTorch's inference mode, in which nothing can be learned, and what they loaded in it cannot be
part of a gradient. So a training leaves that mode, and takes copies of the weights that gradients go through.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import runtime
from .loss_curve import loss_curve, relative_errors, smoothed

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..cascade_ops.handles import StageHandle
    from ..cascade_ops.training.objective import Objective, TrainingStep
    from ..cascade_ops.training.parts import Parts
    from ..cascade_ops.training.settings import Settings

_log = logging.getLogger(__name__)

# How many pictures of the loss curve a run sends to the editor.
_PREVIEWS = 50
# Steps between the states that a run which may be resumed writes.
_SAVE_EVERY = 100


@dataclass(frozen=True)
class Learned:
    """What a training in a node gave.

    path: of the file, and file: its name below its model folder. more: of further files, such as learned tokens. said:
    how the run went. curve: the same as a picture.
    """

    path: Path
    file: str
    more: tuple[Path, ...]
    said: str
    curve: Image.Image


def learn(
    settings: Settings,
    given: Mapping[str, StageHandle],
    pictures: Tensor | None,
    captions: list[str],
    *,
    name: str,
    folder: str,
    resume: bool,
) -> Learned:
    """Train what the settings describe and put the result into the model folder `folder` as `name`.

    given: the stages by name. pictures: ``[N, H, W, 3]``, 0..1, with `captions`, one each; None trains on the sources
    in the settings. Where the user stops the run, what was learned until then is saved in the same way, and the
    host's interruption goes on.

    Raises:
        ValueError: settings, models or pictures that do not fit.
        FloatingPointError: the loss became infinite or no number.
    """
    import torch

    _check_name(name)
    target = Path(runtime.model_directory(folder))
    _check_writable(target)
    runtime.make_room()
    with torch.inference_mode(False), torch.enable_grad(), _own_random_numbers(), _run_folder(name, resume) as run:
        settings = _settled(settings, run, given["stage_c"].dtype, resume)
        stages = {stage: _trainable(handle) for stage, handle in given.items()}
        files, steps, watch = _train(settings, stages, pictures, captions)
        paths = [place(path, _folder_of(path, run, target), path.stem) for path in files]
    if watch.interruption is not None:
        _log.warning("Interrupted after %d steps; what was learned until then is in %s", steps, paths[0])
        raise watch.interruption
    return Learned(paths[0], paths[0].name, tuple(paths[1:]), watch.describe(steps), watch.curve())


def _train(
    settings: Settings, stages: dict[str, StageHandle], pictures: Tensor | None, captions: list[str]
) -> tuple[list[Path], int, _Watch]:
    """The finished files, the steps that were done, and what was heard meanwhile."""
    from ..cascade_ops.threads import threads_for
    from ..cascade_ops.training import targets
    from ..cascade_ops.training.launch import SingleProcess
    from ..cascade_ops.training.parts import Parts
    from ..cascade_ops.training.trainer import Trainer

    device = runtime.device("stage_c")
    parts = Parts(settings.models, given=stages, frozen_dtype=settings.precision)
    with threads_for(stages["stage_c"]):
        objective = targets.build(settings, parts)
        runtime.check_interrupted()
        data = _data(settings, objective, parts, pictures, captions, device)
        watch = _Watch(settings.steps)
        launch = SingleProcess(device, settings.precision)
        trainer = Trainer(objective, data, settings, launch, watch.report, watch.stop)
        watch.goes_on_from(trainer.step, trainer.losses)
        trainer.run()
        with trainer.average.in_place():
            objective.to("cpu").eval()
            files = objective.export(Path(settings.output), settings.name)
    return files, trainer.step, watch


def _data(
    settings: Settings, objective: Objective, parts: Parts, pictures: Tensor | None, captions: list[str], device: Any
):
    from ..cascade_ops.training.data import TrainingData

    def hear(line: str) -> None:
        runtime.check_interrupted()
        _log.info(line)

    if pictures is None:
        return TrainingData.open(settings, objective.needs, parts, hear, device)
    # A copy: those on the wire may be from inference mode, and stay as they are.
    own = pictures.detach().to("cpu").clone()
    return TrainingData.from_pictures(own, captions, settings, objective.needs, parts, hear, device)


class _Watch:
    """Shows how a run goes, and ends it where the user asks for that.

    The host says so by an exception of its own out of its progress bar. It is kept until what was learned is saved.
    """

    def __init__(self, steps: int):
        self.steps, self.interruption = steps, None
        self._before, self._losses = 0, []
        self._errors, self._levels = [], []
        self._bar = runtime.progress(steps)
        self._every = max(1, steps // _PREVIEWS)

    def goes_on_from(self, step: int, losses: list[float]) -> None:
        """Where the run begins: after so many steps with these losses."""
        self._before, self._losses = step, list(losses)

    def report(self, step: TrainingStep) -> None:
        self._errors.append(step.error.numpy())
        self._levels.append(step.log_snr.numpy())
        due = step.step % self._every == 0 or step.step in (2, step.steps)
        try:
            self._bar.update(step.step, self.curve() if due else None)
        except BaseException as interruption:  # hosts have exceptions of their own for it
            self.interruption = interruption

    def curve(self) -> Image.Image:
        """The errors of this run; where it was over before it began, the losses of the one before."""
        if not self._errors:
            return loss_curve(self._losses)
        errors = relative_errors(self._errors, self._levels)
        done = self._before + len(errors)
        return loss_curve(errors, self.steps if done < self.steps else None, "Error at equal noise", self._before + 1)

    def describe(self, steps: int) -> str:
        if not self._errors:
            return f"{steps} steps, all of them done before"
        line = smoothed(relative_errors(self._errors, self._levels))
        return f"{steps} steps; error at equal noise {line[0]:.3g} at first and {line[-1]:.3g} at last (1: on average)"

    def stop(self) -> bool:
        return self.interruption is not None


def _settled(settings: Settings, run: Path, dtype: Any, resume: bool) -> Settings:
    """The settings with what the host and the models decide."""
    import torch

    cache = Path(runtime.temp_directory(), "cascade_training_cache")
    return replace(
        settings,
        output=str(run),
        # Stage C's own number format, but for float16, in which no gradient survives: autocast takes its weights too.
        precision="float32" if dtype == torch.float32 else "bfloat16",
        save_every=_SAVE_EVERY if resume else 0,
        tensorboard=False,
        data=replace(settings.data, cache_folder=str(cache)),
    )


def _trainable(handle: StageHandle) -> StageHandle:
    """The handle; ValueError where something steers it, or ComfyUI holds its weights in layers of its own."""
    if handle.attached:
        raise ValueError(
            f"{handle.title} carries {handle.attached[0].title}, which training would not see, expected the plain "
            "model: connect it from before the nodes that apply something to it."
        )
    if any(hasattr(layer, "comfy_cast_weights") for layer in handle.network.modules()):
        raise ValueError(
            f"{handle.title} is one of ComfyUI's own models, whose weights cannot be trained on here, expected one of "
            "a Cascade loader: connect that loader."
        )
    return handle


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the generators that other nodes may draw from as they are."""
    import torch

    device = runtime.device("stage_c")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _run_folder(name: str, resume: bool) -> Iterator[Path]:
    """Where a run keeps its state: for good if it may be resumed, else until it ends."""
    if resume:
        run = Path(runtime.output_directory(), "cascade_training", name)
        run.mkdir(parents=True, exist_ok=True)
        yield run
        return
    os.makedirs(runtime.temp_directory(), exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="cascade_training_", dir=runtime.temp_directory()))
    try:
        yield run
    finally:
        shutil.rmtree(run, ignore_errors=True)


def _folder_of(path: Path, run: Path, target: Path) -> Path:
    """Where a finished file goes: embeddings into the folder for them, everything else to `target`."""
    if path.parent == run:
        return target
    embeddings = Path(runtime.model_directory("embeddings"))
    embeddings.mkdir(parents=True, exist_ok=True)
    return embeddings


def place(path: Path, folder: Path, stem: str) -> Path:
    """Move a file into a folder, under a name that is free: ``stem``, ``stem_2``, ``stem_3``, ...

    The folder may be on another disk. Nobody finds half a file under a name that loaders list.
    """
    partial = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        shutil.copyfile(path, partial)
        for target in _names(folder, stem, path.suffix):
            with contextlib.suppress(FileExistsError):
                # Creating it is what makes the name ours where several runs end at once.
                target.open("xb").close()
                os.replace(partial, target)
                break
    finally:
        partial.unlink(missing_ok=True)
    path.unlink()
    return target


def _names(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    yield folder / f"{stem}{suffix}"
    number = 2
    while True:
        yield folder / f"{stem}_{number}{suffix}"
        number += 1


def _check_name(name: str) -> None:
    if not name or {"/", "\\", "\0"} & set(name) or name.startswith("."):
        raise ValueError(
            f"The name is {name!r}, expected one for a file, without folders and not starting with a dot: the file "
            "goes into the models folder."
        )


def _check_writable(folder: Path) -> None:
    """ValueError now and not after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"Nothing can be written into {folder} ({error.strerror}), where the result is to go: allow writing there."
        ) from error


def shown_curve(curve: Image.Image) -> tuple[Tensor, list[dict[str, str]]]:
    """The picture of the loss as an `IMAGE` ``[1, H, W, 3]``, and as a picture for the node to show."""
    import numpy as np
    import torch

    folder = Path(runtime.temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"cascade_loss_{uuid.uuid4().hex[:12]}.png"
    curve.save(path)
    image = torch.from_numpy(np.asarray(curve, dtype=np.float32) / 255)[None]
    return image, [{"filename": path.name, "subfolder": "", "type": "temp"}]
