"""Training nodes that are stopped, go on, or refuse what they are given."""

import json
import logging
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_nodes_kit import MODELS, RUN, TrainingHost, write_folder

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops.training.settings import CONTROL_KINDS
from stable_cascade_nodes.nodes import training, training_run


@pytest.fixture
def bench(tmp_path):
    return TrainingHost(tmp_path)


# Stopping and going on -----------------------------------------------------------------------------------------


def interrupted(bench, at, **inputs):
    """Run a LoRA training that the user stops at a step."""
    bench.on_progress = lambda data: data["node"] == "n" and data["value"] == at and bench.host.interrupt()
    status, values = bench.train("CascadeTrainLoRA", (2,), **inputs)
    bench.on_progress = None
    assert values == [None] and status["messages"][-1][0] == "execution_interrupted"


def test_what_an_interrupted_run_has_learned_is_saved(bench, caplog):
    with caplog.at_level(logging.WARNING):
        interrupted(bench, 4, steps=9)
    assert bench.files("loras") == ["mine.safetensors"]
    path = bench.root / "models/loras/mine.safetensors"
    assert f"after 5 steps; what was learned until then is in {path}" in caplog.text
    five = load_file(path)
    whole = bench.trained("CascadeTrainLoRA", (2,), steps=5)[0]
    whole = load_file(path.with_name(whole))
    assert five.keys() == whole.keys() and all(torch.equal(five[name], whole[name]) for name in five)
    # The next run of the same graph begins anew.
    assert not (bench.root / "output").exists()


def test_a_run_that_may_be_resumed_goes_on_and_ends_the_same(bench):
    interrupted(bench, 3, steps=6, resume=True)
    seen = []
    bench.on_progress = lambda data: seen.append(data["value"])
    files = bench.trained("CascadeTrainLoRA", (2,), steps=6, resume=True)
    bench.on_progress = None
    assert seen[:2] == [5, 6]
    files += bench.trained("CascadeTrainLoRA", (2,), steps=8, resume=True)
    files += bench.trained("CascadeTrainLoRA", (2,), steps=8)
    assert files == ["mine_2.safetensors", "mine_3.safetensors", "mine_4.safetensors"]
    resumed, anew = (load_file(bench.root / "models/loras" / name) for name in files[1:])
    assert all(torch.equal(resumed[name], anew[name]) for name in anew)
    with safe_open(bench.root / "output/cascade_training/mine/checkpoint.safetensors", "pt") as run:
        assert json.loads(run.metadata()["cascade.run"])["step"] == 8
    assert "made with seed 0 and is asked to go on with 1" in bench.refused("CascadeTrainLoRA", resume=True, seed=1)


def test_an_interruption_before_the_first_step_leaves_nothing(bench):
    bench.host.backend.make_room = bench.host.interrupt
    status, _ = bench.train("CascadeTrainLoRA")
    assert status["messages"][-1][0] == "execution_interrupted" and not bench.files("loras")


# Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("LoRA", {"folder": "boxes"}, "Pictures are connected and the folder 'boxes' is named, expected one of them"),
        ("LoRA", {"pictures": None}, "There are no pictures to learn from: connect pictures, or name a folder."),
        ("LoRA", {"pictures": None, "folder": "none"}, "none is no folder, expected one with pictures"),
        ("LoRA", {"captions": ""}, "captions has no text, expected one line: say what the pictures show."),
        ("LoRA", {"captions": "a\nb\nc"}, "captions has 3 lines, expected one line: say what"),
        ("LoRA", {"name": "../mine"}, "The name is '../mine', expected one for a file, without folders"),
        ("LoRA", {"name": " "}, "The name is '', expected one for a file"),
        ("LoRA", {"initial_words": "dog"}, "initial_words is 'dog' and token is empty, expected a new word"),
        ("LoRA", {"token": "[box]"}, "None of the captions has the word [box] in it"),
        ("LoRA", {"token": "[box", "captions": "a [box"}, "[box"),
        ("LoRA", {"modules": "nothing"}, "nothing"),
        ("LoRA", {"resolution": 16}, "The resolution is 16, expected at least"),
        ("ControlNet", {"kind": "identity"}, "the kind is identity, whose faces are known by the names of files"),
        ("ControlNet", {"faces": "f.json"}, "faces is named and the kind is canny, expected none with it"),
        (
            "ControlNet",
            {"kind": "identity", "pictures": None, "folder": "."},
            "faces is empty and the kind is identity, expected a file of boxes and embeddings with it",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(bench, node, inputs, message):
    (bench.root / "input").mkdir()
    said = bench.refused(f"CascadeTrain{node}", **({"kind": "canny"} if node == "ControlNet" else {}) | inputs)
    assert message in said and said.endswith(".")
    assert not bench.files("loras") and not bench.files("controlnet")


def test_a_folder_takes_one_caption_or_none(bench):
    write_folder(bench.root, ["a", "b"])
    run = {"pictures": None, "folder": "boxes"}
    said = bench.refused("CascadeTrainLoRA", captions="a\nb", **run)
    assert said.startswith("captions has 2 lines for a folder, expected one for all of its pictures, or none")


def test_a_stage_c_that_something_steers_is_refused(bench):
    more = {"kind": "canny", "captions": "a square", "pictures": ["p", 0], "steps": 1}
    nodes = {
        "x": ("CascadeCannyControl", {"image": ["p", 0], "low": 100, "high": 200, "side": 0}),
        "m": ("CascadeTrainControlNet", {**RUN, **MODELS, **more}),
    }
    apply = {
        "stage_c": ["c", 0],
        "controlnet": ["m", 0],
        "control": ["x", 0],
        "strength": 1.0,
        "start": 1.0,
        "end": 0.0,
    }
    nodes["a"] = ("CascadeApplyControlNet", apply)
    said = bench.refused("CascadeTrainLoRA", nodes, stage_c=["a", 0])
    assert "carries" in said and "which training would not see, expected the plain model" in said


def test_a_models_folder_that_cannot_be_written_is_refused_first(bench):
    (bench.root / "models").mkdir()
    (bench.root / "models/loras").write_text("no folder")
    assert "Nothing can be written into" in bench.refused("CascadeTrainLoRA")
    assert not [data for kind, data in bench.messages if kind == "progress" and data["node"] == "n"]


def test_the_lists_of_the_library_are_offered_whole():
    required = NODE_CLASS_MAPPINGS["CascadeTrainControlNet"].INPUT_TYPES()["required"]
    assert required["kind"][0] == list(CONTROL_KINDS)
    for name in ("LoRA", "ControlNet", "IPAdapter"):
        declared = getattr(training, f"CascadeTrain{name}").INPUT_TYPES()
        assert "seed" in declared["required"] and declared["required"]["seed"][1]["control_after_generate"] is False


# Files ---------------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_gets_a_number_and_half_a_file_no_name(tmp_path, monkeypatch):
    folder = tmp_path / "loras"
    folder.mkdir()
    placed = []
    for content in ("one", "two", "three"):
        source = tmp_path / "learned.safetensors"
        source.write_text(content)
        placed.append(training_run.place(source, folder, "mine").name)
        assert not source.exists()
    assert placed == ["mine.safetensors", "mine_2.safetensors", "mine_3.safetensors"]
    assert [(folder / name).read_text() for name in placed] == ["one", "two", "three"]
    source.write_text("four")
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append(old.read_text()), real(old, new)))
    training_run.place(source, folder, "mine")
    assert seen == ["four"]
    source.write_text("five")
    monkeypatch.setattr(training_run.shutil, "copyfile", lambda old, new: new.write_text("fi") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training_run.place(source, folder, "mine")
    assert len(list(folder.iterdir())) == 4 and source.read_text() == "five"
