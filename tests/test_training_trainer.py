"""The training loop: a resumed run is the run, a divided batch is the batch, a broken loss stops it."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_kit import Numbers, SumObjective, settings, trainer

from stable_cascade_nodes.cascade_ops.training import checkpoint
from stable_cascade_nodes.cascade_ops.training.average import WeightAverage
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.objective import trained_parameters
from stable_cascade_nodes.cascade_ops.training.optimizers import learning_rate, make_optimizer
from stable_cascade_nodes.cascade_ops.training.settings import Optimizer


def tensors_of(folder):
    state = checkpoint.read(folder / checkpoint.FILE_NAME)
    groups = [state.weights, state.average, state.own, *state.optimizer.values()]
    flat = {f"{i}.{name}": value for i, group in enumerate(groups) for name, value in group.items()}
    return flat | {"losses": torch.tensor(state.losses), "step": torch.tensor(state.step)}


def same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(torch.as_tensor(second[name]), torch.as_tensor(value), rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer):
    change = {"optimizer": {"name": optimizer}}
    assert trainer(tmp_path / "whole", SumObjective(0.3), **change).run()
    stopper = trainer(tmp_path / "parts", SumObjective(0.3), stop=lambda: stopper.step == 7, **change)
    assert stopper.run() is False
    second = trainer(tmp_path / "parts", SumObjective(0.3), **change)
    assert second.step == 7 and len(second.losses) == 7
    assert second.run()
    same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts"))


def test_training_learns_and_reports_every_step(tmp_path):
    seen = []
    run = trainer(tmp_path, steps=200, report=seen.append)
    run.run()
    assert [info.step for info in seen] == list(range(1, 201))
    mses = [info.figures["mse"] for info in seen]
    assert sum(mses[-20:]) < 0.2 * sum(mses[:20])
    assert all(len(info.error) == len(info.log_snr) == 4 for info in seen)
    assert seen[0].loss == pytest.approx(run.losses[0]) and seen[-1].learning_rate < seen[5].learning_rate
    assert trained_parameters(run.objective).keys() == run.parameters.keys()
    assert not any(name.startswith("frozen") for name in checkpoint.read(run.path).weights)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulated_batches_are_one_batch(tmp_path, batch, accumulation):
    trainer(tmp_path / "whole").run()
    trainer(tmp_path / "parts", batch_size=batch, optimizer={"accumulation": accumulation}).run()
    same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts"), tolerance=1e-5)


def test_trying_how_long_a_step_takes_changes_nothing(tmp_path):
    plain, tried = trainer(tmp_path / "plain", SumObjective(0.3)), trainer(tmp_path / "tried", SumObjective(0.3))
    assert tried.seconds_per_step() > 0
    plain.run()
    tried.run()
    same(tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "tried"))


def test_other_seed_other_run(tmp_path):
    trainer(tmp_path / "a").run()
    trainer(tmp_path / "b", seed=4).run()
    assert checkpoint.read(tmp_path / "a/checkpoint.safetensors").losses[0] != pytest.approx(
        checkpoint.read(tmp_path / "b/checkpoint.safetensors").losses[0]
    )


def test_a_broken_loss_names_step_and_sample_and_keeps_the_checkpoint(tmp_path):
    run = trainer(tmp_path, data=Numbers(broken="8/2"))
    with pytest.raises(FloatingPointError, match=r"step 8 is (inf|nan) \(samples 8/2\)"):
        run.run()
    assert checkpoint.read(run.path).step == 5
    assert all(parameter.isfinite().all() for parameter in run.parameters.values())


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 4}, "seed 3"), ({"optimizer": {"learning_rate": 1.0}}, "optimizer.learning_rate")]
)
def test_another_run_does_not_go_on_with_a_checkpoint(tmp_path, change, named):
    trainer(tmp_path).run()
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, **change)


def test_a_finished_run_can_be_made_longer(tmp_path):
    trainer(tmp_path).run()
    longer = trainer(tmp_path, steps=15)
    assert longer.step == 12
    longer.run()
    assert checkpoint.read(longer.path).step == 15


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / checkpoint.FILE_NAME).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"is not the checkpoint of a training run"):
        trainer(tmp_path)


def test_sixteen_bit_weights_are_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"bfloat16 and was to be trained, expected float32"):
        trainer(tmp_path, SumObjective().to(torch.bfloat16))


def test_autocast_runs_in_bfloat16_and_keeps_float32_weights(tmp_path):
    run = trainer(tmp_path / "half", launch=SingleProcess("cpu", "bfloat16"))
    run.run()
    plain = trainer(tmp_path / "full")
    plain.run()
    assert run.losses[0] != plain.losses[0] and run.losses[0] == pytest.approx(plain.losses[0], rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in run.parameters.values())


def test_gradients_are_clipped(tmp_path):
    free = trainer(tmp_path / "free", steps=1, optimizer={"grad_clip": 0.0, "beta1": 0.0})
    clipped = trainer(tmp_path / "clipped", steps=1, optimizer={"grad_clip": 1e-3, "beta1": 0.0})
    free.run()
    clipped.run()
    norms = [sum(state["exp_avg"].square().sum() for state in run.optimizer.state.values()) for run in (free, clipped)]
    assert norms[1].sqrt().item() == pytest.approx(1e-3, rel=1e-3) and norms[0].sqrt() > 0.1


def test_average_follows_the_weights_and_gives_them_back():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage({"p": parameter}, 0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(step=0)  # decay (1 + 0) / (10 + 0)
    torch.testing.assert_close(average.values["p"], torch.full((3,), 0.9))
    average.update(step=1000)
    torch.testing.assert_close(average.values["p"], torch.full((3,), 0.91))
    with average.in_place():
        torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.91))
    torch.testing.assert_close(parameter.detach(), torch.ones(3))
    assert WeightAverage({"p": parameter}, 0.0).values == {}


def test_learning_rates():
    cosine = Optimizer(learning_rate=2.0, schedule="cosine", warmup=4)
    assert [learning_rate(step, 100, cosine) for step in (0, 3)] == pytest.approx([0.5, 2.0], rel=0.01)
    assert learning_rate(50, 100, cosine) == pytest.approx(1.0)
    assert learning_rate(100, 100, cosine) == pytest.approx(0.0)
    assert learning_rate(25, 100, replace(cosine, schedule="linear")) == pytest.approx(1.5)
    assert learning_rate(99, 100, replace(cosine, schedule="constant")) == 2.0


def test_weight_decay_is_for_matrices(tmp_path):
    groups = make_optimizer(trained_parameters(SumObjective()), Optimizer(weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.3, {2}), (0.0, {1})]


def test_the_eight_bit_optimizer_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="adamw8bit runs on CUDA devices and none was found: choose adafactor"):
        make_optimizer(trained_parameters(SumObjective()), Optimizer(name="adamw8bit"))


# A signal that leaves a process no time to tidy up; on Windows every one is of that kind.
SIGNAL = getattr(signal, "SIGKILL", signal.SIGTERM)
KILLED_CODE = -SIGNAL if os.name == "posix" else int(SIGNAL)
KILLED = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import training_kit
    from stable_cascade_nodes.cascade_ops.checkpoints import saving
    chunks = saving._chunks
    run = training_kit.trainer(Path({folder!r}))

    def killed(text, order, tensors):
        for number, chunk in enumerate(chunks(text, order, tensors)):
            if run.step == 10 and number == {chunk}:
                os.kill(os.getpid(), {signal})
            yield chunk

    saving._chunks = killed
    run.run()
"""


def test_a_run_killed_while_it_saves_goes_on_from_the_save_before(tmp_path):
    for chunk in (0, 9):
        folder = tmp_path / str(chunk)
        script = textwrap.dedent(KILLED).format(
            tests=str(Path(__file__).parent), folder=str(folder), chunk=chunk, signal=int(SIGNAL)
        )
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == KILLED_CODE
        again = trainer(folder)
        assert again.step == 5
        again.run()
        whole = trainer(tmp_path / "whole")
        whole.run()
        same(tensors_of(tmp_path / "whole"), tensors_of(folder))


def test_settings_that_may_change_do(tmp_path):
    trainer(tmp_path).run()
    changed = settings(tmp_path, steps=13, save_every=1, log_every=3)
    assert trainer(tmp_path, steps=13, save_every=1, log_every=3).settings == changed
