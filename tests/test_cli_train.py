"""`cascade train` and `cascade dataset check`."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from stable_cascade_nodes.cascade_ops.training import run
from stable_cascade_nodes.cascade_ops.training.logs import read_log
from stable_cascade_nodes.cascade_ops.training.objective import Trained, TrainingStep
from stable_cascade_nodes.cascade_ops.training.settings_file import read_settings
from stable_cascade_nodes.host import cli

RUN = """
target: lora
output: run
steps: 4
save_every: 2
log_every: 2
tensorboard: false
lora: {rank: 2}
data: {resolution: 64, buckets: [1.0], sources: [{path: photos}]}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a run file and four pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASCADE_MODELS", raising=False)
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "photos").mkdir()
    for index, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (80, 64), colour).save(tmp_path / f"photos/{index}.png")
        (tmp_path / f"photos/{index}.txt").write_text(f"a {colour} circle")
    return tmp_path


@pytest.fixture
def shell(place, capsys):
    """Run the command line; returns exit code, stdout, stderr."""

    def call(*arguments):
        code = cli.main(list(arguments))
        return (code, *capsys.readouterr())

    return call


def test_a_run_from_the_file_to_the_finished_lora(shell, place):
    code, out, err = shell("train", "run.yaml")
    assert (code, out) == (0, f"{place / 'run/lora.safetensors'}\n")
    assert (place / "run/lora.safetensors").stat().st_size > 10_000
    assert "training lora\n  trained      18,432 weights in 48 tensors" in err
    assert "step 2/4  loss " in err and "step 4/4  loss " in err and "0 s left" in err
    assert [line["step"] for line in read_log(place / "run/log.jsonl")] == [1, 2, 3, 4]
    assert read_settings(place / "run/settings.yaml") == read_settings(place / "run.yaml")


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_losses(shell, place, monkeypatch):
    assert shell("train", "run.yaml", "--set", "output=whole")[0] == 0
    real = run.train

    def interrupted(settings, report, **arguments):
        def press(done):
            report(done)
            if done.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        return real(settings, report=press, **arguments)

    monkeypatch.setattr(run, "train", interrupted)
    code, out, err = shell("train", "run.yaml")
    assert code == 130
    assert "stopped after step 3 of 4, and saved; go on with: cascade train run.yaml" in err
    assert out == f"{place / 'run/lora.safetensors'}\n", "what was learned so far is kept"
    monkeypatch.setattr(run, "train", real)
    code, out, err = shell("train", "run.yaml")
    assert code == 0 and "going on after step 3 of 4" in err
    logs = [
        [(line["step"], line["loss"]) for line in read_log(place / name / "log.jsonl")] for name in ("run", "whole")
    ]
    assert len(logs[0]) == 4 and logs[0] == logs[1]


def test_sigterm_ends_a_run_as_ctrl_c_does(shell, place, monkeypatch):
    def train(settings, report, stop, say):
        os.kill(os.getpid(), signal.SIGTERM)
        return Trained([], 1, [0.5], None, finished=not stop())

    monkeypatch.setattr(run, "train", train)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert shell("train", "run.yaml")[0] == 130
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_ends_it_at_once(shell, monkeypatch):
    def train(settings, report, stop, say):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one was not seen")

    monkeypatch.setattr(run, "train", train)
    code, _, err = shell("train", "run.yaml", "--set", "lora.rank=3")
    assert code == 130
    assert "steps since the last checkpoint (0) are lost; go on with: cascade train run.yaml --set=lora.rank=3" in err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FloatingPointError("The loss at step 7 is nan"), "cascade: The loss at step 7 is nan\n"),
        (ValueError("the data does not fit"), "cascade: the data does not fit\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "does not suffice (CUDA out of memory.); set gradient_"),
    ],
)
def test_a_run_that_fails_says_why(shell, monkeypatch, error, told):
    def train(*_, **__):
        raise error

    monkeypatch.setattr(run, "train", train)
    code, out, err = shell("train", "run.yaml")
    assert (code, out) == (1, "") and told in err


def test_settings_on_the_command_line_come_before_the_file(shell, place, monkeypatch):
    seen = []

    def train(settings, report, stop, say):
        seen.append(settings)
        report(TrainingStep(1, settings.steps, 0.5, 1e-4))
        return Trained([], 1, [0.5], None)

    monkeypatch.setattr(run, "train", train)
    assert shell("train", "run.yaml", "--set", "steps=9", "--set", "optimizer.learning_rate=3e-5")[0] == 0
    assert (seen[0].steps, seen[0].optimizer.learning_rate) == (9, 3e-5)
    assert (seen[0].lora.rank, seen[0].output) == (2, str(place / "run"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run.yaml", "--set", "lora.rnak=3"], "`lora.rnak` is unknown, did you mean `rank`"),
        (["run.yaml", "--set", "lora"], "Expected NAME=VALUE"),
        (["missing.yaml"], "missing.yaml"),
        (["run.yaml", "--set", "models.stage_c=photos/0.txt"], "0.txt"),
    ],
)
def test_a_run_file_with_problems_trains_nothing(shell, place, arguments, told):
    code, out, err = shell("train", *arguments)
    assert (code, out) == (2, "") and told in err
    assert not (place / "run").exists()


def test_a_folder_with_something_else_in_the_place_of_the_checkpoint_is_left_alone(shell, place):
    (place / "run").mkdir()
    (place / "run/checkpoint.safetensors").write_bytes(b"hello")
    code, _, err = shell("train", "run.yaml")
    assert code == 2 and "is not the checkpoint of a run" in err
    assert (place / "run/checkpoint.safetensors").read_bytes() == b"hello"


def test_check_reads_everything_and_trains_nothing(shell, place):
    (place / "photos/4.png").write_bytes(b"no picture")
    code, out, _ = shell("train", "run.yaml", "--check")
    assert code == 0 and not (place / "run").exists()
    assert "  trained      18,432 weights" in out
    assert "4 pictures with 4 different captions" in out and "1 skipped:" in out


def test_estimate_says_the_memory_alone(shell, place):
    code, out, _ = shell("train", "run.yaml", "--estimate")
    assert code == 0 and out.startswith("training lora\n") and "pictures with" not in out
    assert not (place / "run").exists()


def test_check_of_a_folder(shell, place):
    code, out, _ = shell("dataset", "check", "photos", "--resolution", "128", "--batch-size", "3")
    assert code == 0 and "4 pictures with 4 different captions, 4 samples in a pass of 2 batches of 3" in out
    assert "0.png: a red circle" in out


def test_check_of_a_run_file_takes_its_sources_and_sizes(shell, place):
    code, out, _ = shell("dataset", "check", "run.yaml")
    assert code == 0 and f"{place / 'photos'} (folder): 4 pictures" in out and "  80x80 " in out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nothing"], 1, "nothing is no folder"),
        (["photos", "--batch-size", "0"], 2, "--batch-size is 0, expected 1 or more"),
        (["run.yaml", "--kind", "folder"], 2, "--kind has no effect on a run file"),
        (["photos", "--resolution", "8"], 1, "The resolution is 8"),
    ],
)
def test_what_cannot_be_checked_is_refused(shell, arguments, code, told):
    found, out, err = shell("dataset", "check", *arguments)
    assert (found, out) == (code, "") and told in err


def test_help_shows_a_whole_run_file(place, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    example = text[text.index("  target: lora") : text.index("examples:")]
    (tmp_path / "cat.yaml").write_text(example)
    settings = read_settings(tmp_path / "cat.yaml")
    assert (settings.target, settings.lora.rank, settings.tokens[0].token) == ("lora", 16, "[cat]")
    for command in (line.split("  ")[1] for line in text.splitlines() if line.startswith("  cascade train")):
        arguments = cli._parser().parse_args(command.split()[1:])
        assert str(arguments.file) == "cat.yaml"


def test_a_process_of_its_own_trains_and_only_the_first_of_several_prints(place):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "stable_cascade_nodes.host.cli", "train", "run.yaml", "--set", "steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert (done.returncode, done.stdout) == (0, f"{place / 'run/lora.safetensors'}\n"), done.stderr
    assert "step 2/2" in done.stderr
    assert json.loads((place / "run/log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_other_processes_than_the_first_say_and_write_nothing(shell, place, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    asked = []

    def train(settings, **arguments):
        asked.append(sorted(arguments))
        return Trained([place / "x"], 4, [0.5], None)

    monkeypatch.setattr(run, "train", train)
    assert shell("train", "run.yaml") == (0, "", "")
    assert asked == [["stop"]] and not (place / "run").exists()
