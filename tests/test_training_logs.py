"""What a run writes about itself, also after it was killed and resumed."""

import io
import json

import pytest
import torch

from stable_cascade_nodes.cascade_ops.diffusion import log_snr_at
from stable_cascade_nodes.cascade_ops.training import logs
from stable_cascade_nodes.cascade_ops.training.logs import RunLog, duration, read_log
from stable_cascade_nodes.cascade_ops.training.objective import TrainingStep

# Noise conditions .05, .25 and .25 again: buckets 0, 2 and 2.
LOG_SNR = log_snr_at(torch.tensor([0.05, 0.25, 0.25]))


def done(step, loss=0.5, error=None, steps=8):
    error = None if error is None else torch.tensor(error)
    return TrainingStep(step, steps, loss, 1e-4, error, None if error is None else LOG_SNR, {"mse": loss / 2})


def lines(folder):
    return [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def tensorboard(folder):
    """Tag -> {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_every_step_is_a_line(tmp_path):
    with RunLog(tmp_path / "run", steps=8) as log:
        log.step(done(1, 0.5, [1.0, 2.0, 4.0]))
        log.step(done(2, float("inf"), [1.0, float("nan"), 4.0]))
        log.step(done(3))
        assert len(lines(tmp_path / "run")) == 3, "a line is on disk before the next step"
    first, second, third = lines(tmp_path / "run")
    assert first == {
        "step": 1,
        "loss": 0.5,
        "learning_rate": 1e-4,
        "mse": 0.25,
        "noise": {"0": [1.0, 1], "2": [6.0, 2]},
    }
    assert second["loss"] is None and second["noise"] == {"0": [1.0, 1], "2": [4.0, 1]}
    assert "noise" not in third


def test_the_noisiest_and_cleanest_levels_are_in_the_last_and_first_bucket(tmp_path):
    with RunLog(tmp_path, steps=1) as log:
        ends = log_snr_at(torch.tensor([0.0, 1.0]))
        log.step(TrainingStep(1, 1, 0.5, 1e-4, torch.tensor([1.0, 2.0]), ends))
    assert lines(tmp_path)[0]["noise"] == {"0": [1.0, 1], "9": [2.0, 1]}


def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path):
    with RunLog(tmp_path, steps=8) as log:
        for step in range(1, 6):
            log.step(done(step, step / 10))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # what a kill leaves behind
    with RunLog(tmp_path, steps=8, resumed=3) as log:
        log.step(done(4, 9.0))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_run_in_an_old_folder_begins_a_new_log(tmp_path):
    for loss in (0.1, 0.2):
        with RunLog(tmp_path, steps=8) as log:
            log.step(done(1, loss))
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [0.2]


def test_tensorboard_has_every_step_and_the_error_by_noise(tmp_path):
    with RunLog(tmp_path, steps=8, log_every=2, tensorboard=True) as log:
        log.step(done(1, 0.5, [1.0, 2.0, 4.0]))
        log.step(done(2, 0.25, [2.0, 6.0, 6.0]))
        log.step(done(3, 0.125, [9.0, 9.0, 9.0]))
    found = tensorboard(tmp_path)
    assert found["loss"] == {1: 0.5, 2: 0.25, 3: 0.125}
    assert found["learning_rate"][3] == pytest.approx(1e-4) and found["mse"][1] == 0.25
    assert found["error_by_noise/0.0-0.1"] == {2: 1.5} and found["error_by_noise/0.2-0.3"] == {2: 4.5}
    assert "error_by_noise/0.9-1.0" not in found


def test_a_resumed_run_shows_in_tensorboard_what_an_uninterrupted_one_does(tmp_path):
    errors = {1: [1.0, 2.0, 4.0], 2: [3.0, 1.0, 1.0], 3: [5.0, 5.0, 5.0], 4: [7.0, 7.0, 7.0]}
    options = {"steps": 4, "log_every": 4, "tensorboard": True}
    with RunLog(tmp_path / "whole", **options) as log:
        for step, error in errors.items():
            log.step(done(step, step / 8, error))
    with RunLog(tmp_path / "cut", **options) as log:
        for step in (1, 2, 3):
            log.step(done(step, step / 8 if step < 3 else 99.0, errors[step]))
    with RunLog(tmp_path / "cut", resumed=2, **options) as log:
        for step in (3, 4):
            log.step(done(step, step / 8, errors[step]))
    assert tensorboard(tmp_path / "cut") == tensorboard(tmp_path / "whole")
    assert tensorboard(tmp_path / "cut")["error_by_noise/0.0-0.1"] == {4: 4.0}


def test_missing_tensorboard_is_said_before_the_run(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r'not installed: install it with pip install "stable-cascade-nodes\[train\]"'):
        RunLog(tmp_path / "run", steps=8, tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_there_is_a_line_every_few_steps(tmp_path):
    times = iter([0.0, 4.0, 5.0, 25.0])
    stream = io.StringIO()
    with RunLog(tmp_path, steps=8, resumed=1, log_every=3, stream=stream, clock=lambda: next(times)) as log:
        for step in range(2, 9):
            log.step(done(step, float(step)))
        log.say("done")
    assert stream.getvalue().splitlines() == [
        "step 3/8  loss 2.5000  learning rate 1.00e-04  2.00 s/step  10 s left",
        "step 6/8  loss 5.0000  learning rate 1.00e-04  3.00 steps/s  2 s left",
        "step 8/8  loss 7.5000  learning rate 1.00e-04  10.00 s/step  0 s left",
        "done",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(tmp_path):
    stream = Terminal()
    with RunLog(tmp_path, steps=8, resumed=3, stream=stream) as log:
        for step in range(4, 9):
            log.step(done(step, 0.25))
        log.say("a picture was skipped")
    shown = stream.getvalue()
    assert "3/8" in shown and "8/8" in shown and "loss 0.2500, learning rate 1.00e-04" in shown
    assert "a picture was skipped\n" in shown


def test_a_terminal_without_tqdm_gets_lines(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    with RunLog(tmp_path, steps=8, log_every=8, stream=stream) as log:
        log.step(done(8))
    assert stream.getvalue().startswith("step 8/8  loss 0.5000")


def test_durations_are_in_words():
    assert [duration(seconds) for seconds in (0, 99, 100, 5900, 7500)] == [
        "0 s",
        "99 s",
        "2 min",
        "98 min",
        "2 h 05 min",
    ]
    assert logs.bucket_name(9) == "0.9-1.0"
