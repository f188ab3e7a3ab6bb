"""What a run writes down about itself: a log file, TensorBoard, and a line or a bar for whoever watches."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..diffusion import noise_cond
from .objective import TrainingStep

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
BUCKETS = 10


class RunLog(AbstractContextManager):
    """Writes every step of a run to ``log.jsonl`` in its folder, and to TensorBoard if asked.

    A line of the file is a JSON object: ``step`` (from 1), ``loss``, ``learning_rate``, further figures by name, and
    for diffusion ``noise``: the error by noise level, as sum and number of samples per bucket. Bucket ``i`` holds noise
    conditions from ``i / 10`` to ``(i + 1) / 10``, from a clean latent to pure noise. Numbers that are not finite are
    null. Every `log_every` steps TensorBoard gets the mean error of each bucket since the last time.

    Args:
        folder: of the run.
        steps: of the whole run.
        resumed: steps that were done before; what the files say of later ones is dropped.
        log_every: steps between lines on `stream`, and between figures by noise level.
        tensorboard: write TensorBoard files, below ``tensorboard``.
        stream: where progress is shown, as a bar on a terminal, else as lines; None shows nothing.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        resumed: int = 0,
        log_every: int = 10,
        tensorboard: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._log_every, self._every_bucket = log_every, _Buckets()
        self._writer = _tensorboard(folder / TENSORBOARD_FOLDER, resumed) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_after(folder / LOG_FILE, resumed)
        self._file = (folder / LOG_FILE).open("a", encoding="utf-8")
        self._progress = None if stream is None else _progress(stream, steps, resumed, log_every, clock)

    def step(self, done: TrainingStep) -> None:
        """Note a step that is done."""
        step, error, log_snr = done.step, done.error, done.log_snr
        line: dict[str, Any] = {"step": step, "loss": done.loss, "learning_rate": done.learning_rate, **done.figures}
        noise = _by_noise(error, log_snr) if error is not None and log_snr is not None else {}
        # Flushed, so that a kill loses a line at most.
        plain = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._file.write(json.dumps({**plain, "noise": noise} if noise else plain) + "\n")
        self._file.flush()
        self._every_bucket.add(noise)
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)
        if step % self._log_every == 0:
            means = self._every_bucket.take()
            if self._writer is not None:
                for bucket, mean in means.items():
                    self._writer.add_scalar(f"error_by_noise/{bucket_name(bucket)}", mean, step)
        if self._progress is not None:
            self._progress.step(done)

    def say(self, text: str) -> None:
        """Tell whoever watches something, without spoiling a bar."""
        if self._progress is not None:
            self._progress.say(text)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._progress is not None:
            self._progress.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_after(self, path: Path, resumed: int) -> None:
        """Leave out lines of steps that will be done again, and take up the buckets where the others left them."""
        if not path.exists():
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as kept:
            for line in read_log(path):
                if line["step"] <= resumed:
                    kept.write(json.dumps(line) + "\n")
                    self._every_bucket.add(line.get("noise", {}))
                    if line["step"] % self._log_every == 0:
                        self._every_bucket.take()
        os.replace(temporary, path)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log file; a last line that a kill cut short is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def bucket_name(bucket: int) -> str:
    """``0.3-0.4`` for bucket 3."""
    return f"{bucket / BUCKETS:.1f}-{(bucket + 1) / BUCKETS:.1f}"


def _by_noise(error: Tensor, log_snr: Tensor) -> dict[str, list[float]]:
    """Sum and number of the errors in each bucket of noise that has any; errors that are not finite are left out."""
    error = error.detach().float().cpu()
    buckets = (noise_cond(log_snr.detach().float().cpu()) * BUCKETS).long().clamp(0, BUCKETS - 1)
    sums = {}
    for bucket in buckets.unique().tolist():
        inside = error[(buckets == bucket) & torch.isfinite(error)]
        if len(inside):
            sums[str(bucket)] = [inside.sum().item(), len(inside)]
    return sums


class _Buckets:
    """Sums of errors by noise level since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}

    def add(self, noise: Mapping[str, list[float]]) -> None:
        for bucket, (total, number) in noise.items():
            sums = self._sums.setdefault(int(bucket), [0.0, 0])
            sums[0] += total
            sums[1] += number

    def take(self) -> dict[int, float]:
        """The mean error by bucket, and begin anew."""
        means = {bucket: total / number for bucket, (total, number) in sorted(self._sums.items())}
        self._sums = {}
        return means


def _tensorboard(folder: Path, resumed: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "`tensorboard` is on and the package tensorboard is not installed: install it with "
            'pip install "stable-cascade-nodes[train]", or set tensorboard: false.'
        ) from error
    return SummaryWriter(str(folder), purge_step=resumed + 1 if resumed else None)


def _progress(stream: TextIO, steps: int, resumed: int, log_every: int, clock: Callable[[], float]) -> Any:
    if stream.isatty():
        try:
            return _Bar(stream, steps, resumed)
        except ImportError:  # lines do as well
            pass
    return _Lines(stream, steps, resumed, log_every, clock)


class _Lines:
    """A line every few steps: mean loss since the last one, learning rate, speed, time left."""

    def __init__(self, stream: TextIO, steps: int, resumed: int, log_every: int, clock: Callable[[], float]):
        self._stream, self._steps, self._log_every, self._clock = stream, steps, log_every, clock
        self._done, self._began, self._losses = resumed, clock(), [0.0, 0]
        self._resumed, self._first = resumed, self._began

    def step(self, done: TrainingStep) -> None:
        step = done.step
        self._losses[0] += done.loss
        self._losses[1] += 1
        if step % self._log_every and step != self._steps:
            return
        now = self._clock()
        speed = (step - self._done) / max(now - self._began, 1e-9)
        overall = (step - self._resumed) / max(now - self._first, 1e-9)
        mean = self._losses[0] / self._losses[1]
        shown = f"{speed:.2f} steps/s" if speed >= 1 else f"{1 / speed:.2f} s/step"
        self.say(
            f"step {step}/{self._steps}  loss {mean:.4f}  learning rate {done.learning_rate:.2e}  {shown}  "
            f"{duration((self._steps - step) / overall)} left"
        )
        self._done, self._began, self._losses = step, now, [0.0, 0]

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is open."""


class _Bar:
    """tqdm's bar; ImportError where it is not installed."""

    def __init__(self, stream: TextIO, steps: int, resumed: int):
        from tqdm import tqdm

        self._bar = tqdm(total=steps, initial=resumed, file=stream, unit="step", dynamic_ncols=True, desc="training")
        self._mean: float | None = None

    def step(self, done: TrainingStep) -> None:
        # Single losses jump with the noise level that was drawn.
        self._mean = done.loss if self._mean is None else 0.98 * self._mean + 0.02 * done.loss
        self._bar.set_postfix_str(f"loss {self._mean:.4f}, learning rate {done.learning_rate:.2e}", refresh=False)
        self._bar.update(done.step - self._bar.n)

    def say(self, text: str) -> None:
        self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """``12 s``, ``5 min``, ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
