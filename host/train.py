"""`cascade train` and `cascade dataset check`: train what a run file describes, and say what it would be trained on."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import FAILED, INTERRUPTED, OK, interrupting, refuse, say

if TYPE_CHECKING:
    from ..cascade_ops.training.settings import Settings

SETTINGS_FILE = "settings.yaml"

_TRAIN_EXAMPLES = """a run file, cat.yaml:
  target: lora                       # or stage_c, stage_b, controlnet, ip_adapter, textual_inversion, ...
  output: runs/cat                   # checkpoint, log, samples and the finished files go there
  steps: 1000
  precision: bfloat16
  tokens:
    - {token: "[cat]", init: cat}    # a new word for what the pictures show
  lora: {rank: 16}
  data:
    sources:
      - path: photos                 # pictures, each with a text file of its name: tom.jpg, tom.txt

examples:
  cascade train cat.yaml             begin, or go on where it stopped
  cascade train cat.yaml --check     read the file and every picture, train nothing
  cascade train cat.yaml --estimate  say how much memory it takes
  cascade train cat.yaml --set optimizer.learning_rate=3e-5 --set output=runs/slow
  accelerate launch -m stable_cascade_nodes.host.cli train cat.yaml     on several GPUs
  tensorboard --logdir runs          watch the losses in a browser

Ctrl-C ends the run after the step, saves it and writes what was learned so far; the same command goes on.
All settings: docs/training.md. Paths of finished files go to standard output, everything else to standard error.

exit codes: 0 done, 1 the run failed, 2 wrong usage or a run file with problems, 130 interrupted
"""

_CHECK_EXAMPLES = """examples:
  cascade dataset check photos                     a folder of pictures with captions beside them
  cascade dataset check photos --resolution 768
  cascade dataset check shards --kind webdataset   tars
  cascade dataset check cat.yaml                   all sources of a run file

exit codes: 0 there is something to train on (skipped pictures are listed), 1 there is not, 2 wrong usage
"""


def add_commands(commands: Any) -> None:
    """Add the parsers of `train` and `dataset` to those of `cascade`."""
    train = commands.add_parser(
        "train",
        help="train what a run file describes",
        description="Train what a run file (YAML or TOML) describes, or go on with it.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(command=_train)
    train.add_argument("file", type=Path, help="the run file")
    train.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting in place of the file's, such as steps=500 or data.sources.0.repeats=10",
    )
    train.add_argument(
        "--check", action="store_true", help="check the file, the models and every picture; train nothing"
    )
    train.add_argument("--estimate", action="store_true", help="say how much memory the run takes; train nothing")

    dataset = commands.add_parser("dataset", help="look at pictures to train on", description="Look at training data.")
    actions = dataset.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="say what would be trained on",
        description="Read every picture and say what would be trained on, and what is wrong with it.",
        epilog=_CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(command=_check_dataset)
    check.add_argument("source", type=Path, help="a folder, a tar, a dataset on disk, or a run file")
    check.add_argument("--kind", choices=("folder", "webdataset", "huggingface"), help="default: by what is there")
    check.add_argument("--resolution", type=int, metavar="PIXELS", help="side of a square picture (default: 1024)")
    check.add_argument("--batch-size", type=int, metavar="N", help="default: 1")


def _train(arguments: argparse.Namespace) -> int:
    from ..cascade_ops.training.estimate import estimate
    from ..cascade_ops.training.settings_file import read_settings

    try:
        settings = read_settings(arguments.file, arguments.settings)
    except (ValueError, OSError) as error:
        return refuse(str(error))
    only_look = arguments.check or arguments.estimate
    if _is_main():
        try:
            found = estimate(settings).describe()
        except (ValueError, OSError) as error:
            return refuse(str(error))
        except RuntimeError as error:  # something that cannot be done without numbers
            if arguments.estimate:
                say(f"this run cannot be estimated ({error})")
                return FAILED
            found = f"training {settings.target}, memory not estimated ({error})"
        print(found, file=sys.stdout if only_look else sys.stderr)
    if arguments.check:
        print()
        return _report_data(settings)
    return OK if arguments.estimate else _run(settings, arguments)


def _run(settings: Settings, arguments: argparse.Namespace) -> int:
    from ..cascade_ops.training.logs import RunLog
    from ..cascade_ops.training.run import train

    folder, again = Path(settings.output), _command_line(arguments)
    stop = threading.Event()
    try:
        done = _steps_done(folder)
        log = None
        if _is_main():
            _keep(settings, folder)
            log = RunLog(
                folder,
                steps=settings.steps,
                resumed=done,
                log_every=settings.log_every,
                tensorboard=settings.tensorboard,
                stream=sys.stderr,
            )
            if done:
                log.say(f"going on after step {done} of {settings.steps}")
    except (ValueError, OSError) as error:
        return refuse(str(error))
    try:
        with log or contextlib.nullcontext(), interrupting(stop.set), _terminating(stop):
            if log is None:
                trained = train(settings, stop=stop.is_set)
            else:
                trained = train(settings, report=log.step, stop=stop.is_set, say=log.say)
    except KeyboardInterrupt:
        say(f"interrupted; steps since the last checkpoint ({_steps_done(folder)}) are lost; go on with: {again}")
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        say(_explained(error))
        return FAILED
    if _is_main():
        for path in trained.files:
            print(path)
        if not trained.finished:
            say(f"stopped after step {trained.steps} of {settings.steps}, and saved; go on with: {again}")
    return OK if trained.finished else INTERRUPTED


def _check_dataset(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..cascade_ops.training.settings import Data, Settings, Source
    from ..cascade_ops.training.settings_file import read_settings

    if arguments.source.suffix.lower() in (".yaml", ".yml", ".toml"):
        if arguments.kind:
            return refuse("--kind has no effect on a run file, whose sources have their own: leave it out")
        try:
            settings = read_settings(arguments.source)
        except (ValueError, OSError) as error:
            return refuse(str(error))
    else:
        kind = arguments.kind or _kind_of(arguments.source)
        settings = Settings("stage_c", "", data=Data(sources=(Source(str(arguments.source), kind),)))
    if arguments.resolution is not None:
        settings = replace(settings, data=replace(settings.data, resolution=arguments.resolution))
    if arguments.batch_size is not None:
        if arguments.batch_size < 1:
            return refuse(f"--batch-size is {arguments.batch_size}, expected 1 or more")
        settings = replace(settings, batch_size=arguments.batch_size)
    return _report_data(settings)


def _report_data(settings: Settings) -> int:
    from ..cascade_ops.training.data import TrainingData

    try:
        print(TrainingData.open(settings, frozenset(), None).check())
    except (ValueError, OSError) as error:
        say(str(error))
        return FAILED
    return OK


def _kind_of(path: Path) -> str:
    """What kind of source a path looks like."""
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return "webdataset"
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return "huggingface"
    return "folder"


def _keep(settings: Settings, folder: Path) -> None:
    """Write what is run to the run's folder."""
    from ..cascade_ops.training.settings_file import write_settings

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{SETTINGS_FILE}.{os.getpid()}.tmp"
    temporary.write_text(write_settings(settings), encoding="utf-8")
    os.replace(temporary, folder / SETTINGS_FILE)


def _steps_done(folder: Path) -> int:
    """The step of the checkpoint in a run's folder, 0 where there is none; ValueError where it cannot be read."""
    import json

    from ..cascade_ops.checkpoints.header import read_header
    from ..cascade_ops.training.checkpoint import FILE_NAME

    path = folder / FILE_NAME
    if not path.exists():
        return 0
    try:
        return int(json.loads(read_header(path).metadata["cascade.run"])["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the checkpoint of a run ({error}), expected one that `cascade train` wrote: delete it to "
            "begin anew, or choose another output."
        ) from error


def _is_main() -> bool:
    """Whether this is the process that prints, of those that a launcher has started."""
    return int(os.environ.get("RANK", "0")) == 0


def _command_line(arguments: argparse.Namespace) -> str:
    return shlex.join(["cascade", "train", str(arguments.file), *(f"--set={text}" for text in arguments.settings)])


def _explained(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"the device's memory does not suffice ({str(error).splitlines()[0]}); set gradient_checkpointing: true, "
            "precision: bfloat16, optimizer.name: adafactor, or a smaller batch_size with more optimizer.accumulation"
        )
    return str(error)


@contextlib.contextmanager
def _terminating(stop: threading.Event) -> Iterator[None]:
    """Inside the block SIGTERM, which clusters send before they kill, ends the run as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
