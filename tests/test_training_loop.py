"""The training loop: a resumed run is the run, the average is one, a broken loss stops it."""

import os

import pytest
import torch
from torch import nn

from stable_cascade_nodes.cascade_ops.diffusion import AdaptiveLossWeight
from stable_cascade_nodes.cascade_ops.training.loop import (
    LoopConfig,
    Trainer,
    learning_rate,
    read_tensors,
    step_generator,
    write_tensors,
)

CONFIG = LoopConfig(steps=12, lr=0.05, warmup=3, ema_decay=0.8, log_every=4, save_every=5, seed=3)


def make_run(path, config=CONFIG, lines=None):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    weight = AdaptiveLossWeight(8, (-9.3, 9.3), beta=0.5, interpolate=True)

    def loss(step, generator):
        x = torch.randn(16, 4, generator=generator)
        error = (module(x) - x.sum(dim=1, keepdim=True)).square().mean(dim=1)
        log_snr = torch.linspace(-5, 5, 16)
        value = (error * weight(log_snr)).mean()
        weight.update(log_snr, error)
        return value, {"mean": error.mean().item()}

    return Trainer(module, loss, config, path, weight)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = make_run(tmp_path / "whole.safetensors")
    whole.run(log=lambda line: None)
    make_run(tmp_path / "parts.safetensors").run(until=7, log=lambda line: None)
    second = make_run(tmp_path / "parts.safetensors")
    assert second.step == 7
    second.run(log=lambda line: None)
    first_file, second_file = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert first_file[1] == second_file[1] == {"step": "12"}
    assert first_file[0].keys() == second_file[0].keys()
    for name, value in first_file[0].items():
        assert torch.equal(value, second_file[0][name]), name


def test_training_learns_and_logs(tmp_path):
    lines = []
    run = make_run(tmp_path / "run.safetensors")
    run.run(log=lines.append)
    means = [float(line.split("mean ")[1].split()[0]) for line in lines]
    assert [line.split()[1] for line in lines] == ["4/12", "8/12", "12/12"]
    assert means[-1] < 0.5 * means[0]


def test_average_is_between_and_weights_come_back(tmp_path):
    run = make_run(tmp_path / "run.safetensors")
    run.run(log=lambda line: None)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    with run.averaged() as module:
        inside = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert any(not torch.equal(inside[name], before[name]) for name in before)
    assert all(torch.equal(inside[name], run.average[name]) for name in before)
    assert all(torch.equal(p, before[name]) for name, p in run.module.named_parameters())


def test_without_average_the_weights_are_used_as_they_are(tmp_path):
    run = make_run(tmp_path / "run.safetensors", LoopConfig(steps=3, lr=0.05, ema_decay=0.0))
    run.run(log=lambda line: None)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    with run.averaged() as module:
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert make_run(tmp_path / "run.safetensors", LoopConfig(steps=3, lr=0.05, ema_decay=0.0)).average == {}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    module = nn.Linear(2, 1)

    def loss(step, generator):
        value = module(torch.ones(1, 2)).sum()
        return (value * float("nan") if step == 2 else value), {}

    run = Trainer(module, loss, CONFIG, tmp_path / "run.safetensors")
    with pytest.raises(FloatingPointError, match="step 2"):
        run.run(log=lambda line: None)
    assert run.step == 2


def test_learning_rate_warms_up_and_ends_at_zero():
    config = LoopConfig(steps=100, lr=1.0, warmup=10)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=1e-2)
    assert max(rates) == rates[10] or max(rates) == rates[9]
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def test_steps_draw_different_numbers_and_seeds_too():
    draws = {torch.randn(4, generator=step_generator(seed, step)).sum().item() for seed in (0, 1) for step in (0, 1)}
    assert len(draws) == 4


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    write_tensors({"a": torch.zeros(2)}, path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors({"a": torch.ones(2)}, path)
    assert torch.equal(read_tensors(path)[0]["a"], torch.zeros(2))
