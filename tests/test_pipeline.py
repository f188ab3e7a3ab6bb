"""The Python front door, and that it gives the picture of the graph."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade_nodes.cascade_ops import catalog
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.host.pack import open_host

GRAPH = json.loads((Path(__file__).parents[1] / "workflows/api/text_to_image.json").read_text())
PROMPT = "a (large:1.2) red circle"


@pytest.fixture(scope="module")
def pipeline(small_family):
    return CascadePipeline.load(small_family.models, device="cpu")


def generate(pipeline, **settings):
    return pipeline.generate(PROMPT, **{"steps_c": 2, "steps_b": 2, "width": 100, "height": 60} | settings)


def pixels(picture):
    return np.asarray(picture).astype(int)


def run_graph(root, graph):
    """The pictures that a graph saves in a host whose folders lie in `root`."""
    host = open_host(DataFolders(root))
    status, answer = host.submit({"prompt": graph})
    assert status == 200 and not answer["node_errors"], answer
    entry = host.history(host.run_next())[answer["prompt_id"]]
    assert entry["status"]["completed"], entry["status"]["messages"][-1]
    (shown,) = (shown["images"] for shown in entry["outputs"].values() if "images" in shown)
    return [Image.open(host.folders.output / image["subfolder"] / image["filename"]) for image in shown], entry


def graph_with(**settings):
    graph = copy.deepcopy(GRAPH)
    for node, inputs in settings.items():
        graph[node.removeprefix("n")]["inputs"] |= inputs
    return graph


def test_same_picture_as_the_workflow_to_the_last_bit(tmp_path, pipeline, small_family):
    shutil.copytree(small_family.models, tmp_path / "models")
    graph = graph_with(
        n6={"text": PROMPT},
        n7={"text": "blue"},
        n8={"width": 100, "height": 60, "batch_size": 2},
        n9={"steps": 3, "seed": 5},
        n10={"steps": 2, "seed": 5},
    )
    saved, entry = run_graph(tmp_path, graph)
    ours = pipeline.generate(PROMPT, "blue", width=100, height=60, seed=5, batch_size=2, steps_c=3, steps_b=2)
    assert [picture.size for picture in saved] == [(100, 60), (100, 60)]
    for theirs, mine in zip(saved, ours, strict=True):
        assert np.array_equal(pixels(theirs), pixels(mine))
    assert pixels(ours[0]).std() > 3
    text = {node: shown["text"] for node, shown in entry["outputs"].items() if "text" in shown}
    assert text["2"] == ["Stage C custom (c.safetensors), float32"]
    assert text["8"] == ["100 x 60 pixels, Stage C latent 3 x 2, batch of 2"]
    assert text["9"] == ["Stage C custom (c.safetensors): 100 x 60 pixels, 3 steps of ddpm, guidance 3, shift 1.5"]
    assert text["10"] == ["Stage B custom (b.safetensors): 100 x 60 pixels, 2 steps of ddpm, guidance 1.2, shift 1"]


def test_settings_reach_the_models(pipeline):
    plain = pixels(generate(pipeline)[0])
    assert np.array_equal(plain, pixels(generate(pipeline)[0]))
    changes = (
        {"seed": 1},
        {"steps_c": 3},
        {"steps_b": 3},
        {"guidance_c": 1.0},
        {"guidance_b": 1.0},
        {"negative_prompt": "blue"},
        {"settings_c": SamplingSettings(sampler="ddim")},
        {"settings_b": SamplingSettings(sampler="ddim")},
    )
    for change in changes:
        assert not np.array_equal(plain, pixels(generate(pipeline, **change)[0])), change
    assert generate(pipeline, width=0, height=0)[0].size == (128, 96)


def test_picture_of_a_batch_is_that_of_its_seed(pipeline):
    batch = generate(pipeline, seed=3, batch_size=3)
    for index, picture in enumerate(batch):
        alone = generate(pipeline, seed=3 + index)[0]
        assert abs(pixels(picture) - pixels(alone)).max() <= 1


def test_callback_hears_of_every_step_and_can_end_the_run(pipeline):
    seen = []
    generate(pipeline, callback=lambda stage, step: seen.append((stage, step.step, step.steps)))
    assert seen == [("stage_c", 0, 2), ("stage_c", 1, 2), ("stage_b", 0, 2), ("stage_b", 1, 2)]

    def stop(stage, step):
        if stage == "stage_b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, callback=stop)


def test_sources(tmp_path, small_family, pipeline, monkeypatch):
    """A folder, a mapping, the models folder, the bundled family: the same files, so the same picture."""
    expected = pixels(generate(pipeline)[0])
    bundled = tmp_path / "weights"
    bundled.mkdir()
    for stage, path in small_family.paths.items():
        shutil.copy(path, bundled / f"{stage}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASCADE_MODELS", raising=False)

    def same(source):
        loaded = CascadePipeline.load(source, device="cpu")
        assert np.array_equal(pixels(generate(loaded)[0]), expected)
        return loaded

    with pytest.raises(ValueError, match="the bundled one is missing"):
        monkeypatch.setattr(catalog, "_BUNDLED_FOLDER", tmp_path / "nowhere")
        CascadePipeline.load("auto")
    monkeypatch.setattr(catalog, "_BUNDLED_FOLDER", bundled)
    assert same("tiny").stage_c.name == "tiny (bundled)"
    assert same("auto").stage_b.name == "tiny (bundled)"
    assert same({"stage_c": small_family.paths["stage_c"]}).stage_c.name == "c.safetensors"
    monkeypatch.setenv("CASCADE_MODELS", str(small_family.models))
    assert same("auto").stage_a.name == "a.safetensors"
    assert same("tiny").stage_a.name == "tiny (bundled)"
    with pytest.raises(ValueError, match=r"names 'stage_x'"):
        CascadePipeline.load({"stage_x": "x"})
    with pytest.raises(ValueError, match="is no folder"):
        CascadePipeline.load(tmp_path / "missing")


def test_former_folder_names_count(tmp_path, small_family, monkeypatch):
    shutil.copytree(small_family.models, tmp_path / "models")
    (tmp_path / "models/diffusion_models").rename(tmp_path / "models/unet")
    (tmp_path / "models/text_encoders").rename(tmp_path / "models/clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASCADE_MODELS", raising=False)
    loaded = CascadePipeline.load("auto", device="cpu")
    assert (loaded.stage_c.name, loaded.text_encoder.name) == ("c.safetensors", "t.safetensors")


def test_dtype_of_the_weights(small_family):
    loaded = CascadePipeline.load(small_family.models, device="cpu", dtype="bfloat16")
    assert loaded.stage_c.dtype == loaded.text_encoder.dtype == torch.bfloat16
    assert generate(loaded)[0].size == (100, 60)


def test_embeddings(tmp_path, small_family):
    from safetensors.torch import save_file

    shutil.copytree(small_family.models, tmp_path / "models")
    (tmp_path / "models/embeddings").mkdir()
    save_file({"clip_g": torch.ones(2, 64)}, tmp_path / "models/embeddings/glow.safetensors")
    loaded = CascadePipeline.load(tmp_path / "models", device="cpu")
    small = {"width": 64, "height": 64, "steps_c": 1, "steps_b": 1}
    with_glow = loaded.generate("a circle embedding:glow", **small)[0]
    assert not np.array_equal(pixels(with_glow), pixels(loaded.generate("a circle", **small)[0]))
    with pytest.raises(ValueError, match="'missing', which was not found"):
        loaded.generate("a circle embedding:missing", **small)
