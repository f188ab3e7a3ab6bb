"""A whole run, from pictures in a folder to files that load."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_training_stage_losses import SMALL_B, SMALL_C

from stable_cascade_nodes.cascade_ops.checkpoints import load
from stable_cascade_nodes.cascade_ops.training import checkpoint
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.run import duration, train
from stable_cascade_nodes.cascade_ops.training.settings import (
    Data,
    Loss,
    Models,
    Optimizer,
    Samples,
    Settings,
    Source,
)
from stable_cascade_nodes.tiny.captions import caption_full
from stable_cascade_nodes.tiny.drawing import random_scene, render
from stable_cascade_nodes.tiny.family import WEIGHTS

BUNDLED_STAGE_C = WEIGHTS / "stage_c.safetensors"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Eight drawn pictures with captions, and one that is cut short."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for number in range(8):
        scene = random_scene(rng, "train", 1)
        Image.fromarray(render(scene, 256)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption_full(scene))
    whole = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(whole[: len(whole) // 2])
    return folder


def settings(scenes, output, target, network):
    return Settings(
        target,
        str(output),
        name="mine",
        steps=40,
        batch_size=4,
        save_every=20,
        network=network,
        data=Data(sources=(Source(str(scenes)),), resolution=256, buckets=(1.0,)),
        optimizer=Optimizer(learning_rate=5e-3, warmup=5, ema=0.9),
        loss=Loss(weight="adaptive", buckets=24, interpolate=True, rescale=1.0),
    )


@pytest.mark.parametrize(("target", "network"), [("stage_c", SMALL_C), ("stage_b", SMALL_B)])
def test_a_run_reads_pictures_learns_and_leaves_a_file(tmp_path, scenes, target, network):
    seen, said = [], []
    run = settings(scenes, tmp_path / "run", target, network)
    done = train(run, launch=SingleProcess("cpu"), report=seen.append, say=said.append)
    assert done.finished and done.steps == len(seen) == len(done.losses) == 40
    assert any("7.png" in line for line in said)
    errors = [info.error.mean().item() for info in seen]
    assert sum(errors[-10:]) < 0.95 * sum(errors[:10])
    (path,) = done.files
    assert path == tmp_path / "run" / "mine.safetensors"
    module, info = load(path, target)
    assert (info.size, info.config["c_hidden"]) == ("mine", network["c_hidden"])
    average = checkpoint.read(tmp_path / "run" / checkpoint.FILE_NAME).average
    for name, value in module.named_parameters():
        assert torch.equal(value, average[f"module.{name}"]), name


def test_a_stopped_run_leaves_a_file_and_goes_on(tmp_path, scenes):
    run = settings(scenes, tmp_path / "run", "stage_c", SMALL_C)
    seen = []
    first = train(run, launch=SingleProcess("cpu"), report=seen.append, stop=lambda: len(seen) == 3)
    assert not first.finished and first.steps == 3 and first.files[0].exists()
    second = train(replace(run, steps=6), launch=SingleProcess("cpu"), report=seen.append)
    assert second.finished and [info.step for info in seen] == [1, 2, 3, 4, 5, 6]
    whole = train(replace(run, steps=6, output=str(tmp_path / "whole")), launch=SingleProcess("cpu"))
    assert second.losses == whole.losses


def test_a_long_run_says_beforehand_how_long_it_will_take(tmp_path, scenes):
    said, seen = [], []
    run = replace(settings(scenes, tmp_path, "stage_c", SMALL_C), steps=50)
    train(run, say=lambda line: said.append((len(seen), line)), report=seen.append, stop=lambda: True)
    assert [(before, line.split(" of ")[0]) for before, line in said if " steps of about " in line] == [(0, "50 steps")]
    assert [duration(s) for s in (0.2, 99, 100, 3540, 7500)] == [
        "about 1 s", "about 99 s", "about 2 min", "about 59 min", "about 2 h 5 min",
    ]  # fmt: skip


def test_an_unknown_target_is_refused(tmp_path, scenes):
    with pytest.raises(ValueError, match=r"target is 'stage_d', expected one of stage_c, stage_b"):
        train(settings(scenes, tmp_path, "stage_d", {}))


def test_a_missing_model_is_named(tmp_path, scenes):
    run = replace(settings(scenes, tmp_path, "stage_c", SMALL_C), models=Models(text_encoder="nowhere.safetensors"))
    with pytest.raises((ValueError, OSError), match=r"nowhere\.safetensors"):
        train(run)


def test_samples_are_written_on_the_way_and_change_nothing(tmp_path, scenes):
    plain = train(replace(settings(scenes, tmp_path / "plain", "stage_c", SMALL_C), steps=4))
    shown = replace(
        settings(scenes, tmp_path / "shown", "stage_c", SMALL_C),
        steps=4,
        samples=Samples(every=2, prompts=("a red circle", "a blue star"), steps=2),
    )
    assert train(shown).losses == plain.losses
    names = sorted(path.name for path in (tmp_path / "shown" / "samples").iterdir())
    assert names == [f"step-00000{step}_0{index}.png" for step in (2, 4) for index in (0, 1)]


def test_fine_tuning_finds_the_best_file_and_an_adapter_wants_a_name(tmp_path, scenes):
    auto = replace(settings(scenes, tmp_path, "stage_c", {}), models=Models(init="auto"), steps=1)
    (path,) = train(auto).files
    assert load(path, "stage_c")[1].config == load(BUNDLED_STAGE_C, "stage_c")[1].config
    with pytest.raises(ValueError, match=r"models\.init is auto for lora, expected a file to go on with"):
        train(replace(auto, target="lora"))
