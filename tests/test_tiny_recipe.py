"""The recipe: every configuration runs with the one trainer, and what comes out is a family with its adapters."""

import importlib
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file
from stable_cascade_nodes.cascade_ops.training.settings_file import read_settings
from stable_cascade_nodes.tiny import evaluate_adapters, publish, recipe, train
from stable_cascade_nodes.tiny.attributes import CLASS_COUNTS, MAP_CLASSES, MENTIONED_COUNTS
from stable_cascade_nodes.tiny.dataset import KINDS, write_dataset
from stable_cascade_nodes.tiny.evaluate import Family
from stable_cascade_nodes.tiny.family import WEIGHTS
from stable_cascade_nodes.tiny.looks import TOKEN
from stable_cascade_nodes.tiny.recipe import ADAPTERS, CONFIGS, PARTS, RECIPE, steps_for

SHORT = ["steps=1", "batch_size=2", "tensorboard=false", "optimizer.warmup=1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a recipe of which every run took one step."""
    folder = tmp_path_factory.mktemp("recipe")
    for kind in KINDS:
        write_dataset(kind, folder / "data" / kind, 4, jobs=1)
    train.copy_configs(folder)
    for name in RECIPE:
        module, *rest = train.command_of(name, folder, SHORT)
        # What `run_step` does, without a process of its own.
        assert not importlib.import_module(f"stable_cascade_nodes.{module}").main(rest), name
        (folder / f"{name}.done").touch()
    return folder


@pytest.mark.parametrize("stage", PARTS)
def test_every_part_is_gathered_as_what_it_is(out, stage):
    path = out / "weights" / f"{stage}.safetensors"
    info = inspect_file(path)
    assert (info.stage, info.size) == (stage, "tiny")
    with safe_open(str(path), "pt") as file:
        assert not any(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118


def test_the_gathered_family_makes_pictures(out):
    family = Family.load(out / "weights")
    assert (family.defaults_c["width"], family.defaults_b["guidance"]) == (256, 2.0)
    assert len(family.stage_b.down_blocks[2]) == 4 * 3  # the deeper Stage B, not the one it grew from
    latent = family.sample_c(["a red circle"], 0, steps=1)
    made = family.decode(family.sample_b(latent, ["a red circle"], 0, steps=1))
    assert made.shape == (1, 256, 256, 3)
    # Of the picture that is made, it can make a variation.
    varied = family.sample_c([""], 0, {"image": family.embed(made)}, steps=1)
    assert not torch.equal(varied, family.sample_c([""], 0, steps=1))


def test_every_adapter_is_measured_with_and_without(out, tmp_path, monkeypatch, capsys):
    publish.main(["--out", str(out), "--to", str(tmp_path / "adapters"), "--adapters"])
    family = Family.load(out / "weights")
    quick = replace(family, defaults_c={**family.defaults_c, "steps": 1}, defaults_b={**family.defaults_b, "steps": 1})
    monkeypatch.setattr(Family, "load", lambda folder: quick)
    places = ["--weights", out / "weights", "--adapters", tmp_path / "adapters"]
    results = ["--samples", tmp_path / "sheets", "--out", tmp_path / "table.md"]
    evaluate_adapters.main([*map(str, [*places, *results]), "--count", "1"])
    lines = (tmp_path / "table.md").read_text().splitlines()
    names = {line.split("|")[1].strip() for line in lines[2:]}
    assert names == {
        *("LoRA", "canny", "inpainting", "inpainting, held", "super-resolution", "identity", "IP-Adapter"),
        *("IP-Adapter and words", "image prompt", "image prompt and words", "reconstruction"),
    }
    assert all(line.count("|") == 6 for line in lines)
    assert {path.stem for path in (tmp_path / "sheets").iterdir()} == set(evaluate_adapters.MEASURES)


def test_adapters_are_gathered_in_float16_and_small(out, tmp_path):
    publish.main(["--out", str(out), "--to", str(tmp_path), "--adapters"])
    found = {path.stem: inspect_file(path) for path in tmp_path.iterdir()}
    assert found.keys() == ADAPTERS.keys()
    stages = {"lora": "lora", "ip_adapter": "ip_adapter"}
    assert {name: info.stage for name, info in found.items()} == {n: stages.get(n, "controlnet") for n in ADAPTERS}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3_600_000
    with safe_open(str(tmp_path / "lora.safetensors"), "pt") as file:
        assert TOKEN in str(file.metadata())


def test_a_finished_recipe_runs_nothing(out, monkeypatch):
    monkeypatch.setattr(train, "run_step", lambda *arguments: pytest.fail("ran"))
    train.main(["--out", str(out)])


def test_configurations_name_the_classes_that_the_data_has():
    names = ("text_encoder", "image_encoder", "image_encoder_large_batches")
    text, *images = (read_settings(CONFIGS / f"{name}.yaml").encoders for name in names)
    assert (text.attributes, text.token_attributes) == (CLASS_COUNTS, MENTIONED_COUNTS)
    assert all(image.attributes == CLASS_COUNTS for image in images)
    for name in ("latent_encoder", "latent_encoder_with_stage_b"):
        assert read_settings(CONFIGS / f"{name}.yaml").encoders.maps == MAP_CLASSES


def test_every_configuration_is_in_the_recipe_under_its_name():
    runs = {name for name, step in RECIPE.items() if step.command[:2] == recipe.TRAIN}
    assert runs == {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in runs:
        settings = read_settings(CONFIGS / f"{name}.yaml")
        assert settings.output.endswith(name)
        assert RECIPE[name].command[2].endswith(f"/{name}.yaml")


def test_the_order_has_what_a_step_needs_before_it(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(train, "run_step", lambda name, *rest: order.append(name))
    train.train(tmp_path, jobs=3, threads=1)
    assert sorted(order) == sorted(RECIPE)
    for name, step in RECIPE.items():
        assert all(order.index(need) < order.index(name) for need in step.needs)
    assert (tmp_path / "configs" / "stage_a.yaml").is_file()


def test_one_part_brings_what_it_needs():
    assert steps_for("image_encoder") == ["data_scenes", "data_captions", "text_encoder", "image_encoder"]
    assert {"weights", "data_look", "stage_c_pictures"} <= set(steps_for("lora"))
    assert "controlnet_canny" not in steps_for("lora")
    with pytest.raises(ValueError, match="no part 'stage_d'"):
        steps_for("stage_d")


def test_a_finished_family_leaves_only_the_adapter_to_train(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(train, "run_step", lambda name, *rest: order.append(name))
    train.main(["--out", str(tmp_path), "--weights", str(WEIGHTS), "--only", "lora"])
    assert order == ["data_look", "lora"]
    assert inspect_file(tmp_path / "weights" / "stage_c.safetensors").size == "tiny"
    with pytest.raises(ValueError, match=r"has no stage_c\.safetensors"):
        train.take_weights(tmp_path / "data", tmp_path)


def test_a_failed_step_stops_the_recipe_and_names_its_log(tmp_path, monkeypatch):
    # Any command that refuses its arguments; those of this package take seconds to start.
    monkeypatch.setattr(train, "_PACKAGE", "json")
    monkeypatch.setitem(RECIPE, "stage_a", recipe.Step(("tool", "--nonsense")))
    with pytest.raises(RuntimeError, match=r"stage_a ended with code 2: read .*stage_a\.log"):
        train.run_step("stage_a", tmp_path, threads=1)
    assert "usage:" in (tmp_path / "stage_a.log").read_text()
