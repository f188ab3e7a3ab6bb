"""Explore, then finish, in whole graphs: what another choice runs, and what it shows."""

import json
import re

import pytest
import torch
from editor import ROOT
from explore_kit import FOLLOWING, SAMPLER_B, SAMPLER_C, choosing
from nodes_kit import load, run, sample_c

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops import stages
from stable_cascade_nodes.cascade_ops.finished import FinishedPictures, StageBRun
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.host.pack import open_host
from stable_cascade_nodes.workflows.write import written

GRAPH = json.loads((ROOT / "workflows/api/text_to_image.json").read_text(encoding="utf-8"))


class Watched:
    """The embedded host with small models; tells which nodes ran, their steps and what they said."""

    def __init__(self, folder, models):
        (folder / "models").symlink_to(models, target_is_directory=True)
        self.messages = []
        self.host = open_host(DataFolders(folder), lambda kind, data, client: self.messages.append((kind, data)))

    def run(self, graph):
        self.messages.clear()
        status, answer = self.host.submit({"prompt": graph, "client_id": "me"})
        assert status == 200 and not answer["node_errors"], answer
        prompt_id = self.host.run_next()
        entry = self.host.history(prompt_id)[prompt_id]
        assert entry["status"]["completed"], entry["status"]
        return entry

    def ran(self):
        return {data["node"] for kind, data in self.messages if kind == "executing"} - {None}

    def steps(self, node):
        found = (data["nodes"].get(node) for kind, data in self.messages if kind == "progress_state")
        return max((state["value"] for state in found if state and state["max"] == 3), default=0)

    def said(self):
        return self.host.history()[next(reversed(self.host.history()))]["outputs"][SAMPLER_B]["text"][1:]


@pytest.fixture
def watched(tmp_path, small_family):
    return Watched(tmp_path, small_family.models)


def test_another_choice_runs_only_what_follows_it_and_samples_only_what_is_new(watched):
    watched.run(choosing(GRAPH, "0, 2"))
    assert watched.ran() == {*GRAPH, *FOLLOWING}
    assert watched.steps(SAMPLER_B) == 3 and watched.said() == []
    for choice, steps, said in (
        ("0, 2, 3", 3, ["2 of 3 pictures kept from an earlier run"]),
        ("3", 0, ["1 of 1 pictures kept from an earlier run"]),
        ("1", 3, []),
    ):
        entry = watched.run(choosing(GRAPH, choice))
        assert watched.ran() == FOLLOWING
        assert (watched.steps(SAMPLER_B), watched.said()) == (steps, said)
        assert len(entry["outputs"]["12"]["images"]) == choice.count(",") + 1


@pytest.mark.parametrize("changes", [{"seed": 8}, {"guidance": 1.3}, {"sampler": "ddim"}])
def test_another_setting_of_stage_b_keeps_nothing(watched, changes):
    watched.run(choosing(GRAPH, "0"))
    watched.run(choosing(GRAPH, "0", **changes))
    assert SAMPLER_C not in watched.ran()
    assert watched.steps(SAMPLER_B) == 3 and watched.said() == []


def test_free_memory_forgets_finished_pictures(watched):
    watched.run(choosing(GRAPH, "0"))
    watched.host.free()
    watched.run(choosing(GRAPH, "0"))
    assert watched.steps(SAMPLER_B) == 3 and watched.said() == []


def test_a_choice_is_finished_as_in_the_whole_batch(watched):
    whole = watched.run(choosing(GRAPH, "0-3"))["outputs"]["12"]["images"]
    watched.host.free()
    chosen = watched.run(choosing(GRAPH, "2"))["outputs"]["12"]["images"]
    wanted, found = (pixels(watched, image) for image in (whole[2], chosen[0]))
    assert (wanted - found).abs().max() <= 1
    assert (pixels(watched, whole[1]) - found).abs().max() > 20


def pixels(watched, image):
    from numpy import asarray
    from PIL import Image

    with Image.open(watched.host.folders.output / image["filename"]) as picture:
        return torch.from_numpy(asarray(picture).astype("int16"))


def test_a_node_with_everything_kept_asks_for_no_model(host):
    first, inputs = sample_c(host)
    inputs = inputs | {"latent": first["result"][0], "stage_b": load("CascadeLoadStageB")}
    inputs.pop("stage_c")
    node = NODE_CLASS_MAPPINGS["CascadeSampleStageB"]()
    host.placings.clear()
    before = node.sample(**inputs, stage_a=load("CascadeLoadStageA"))
    assert len(host.placings) == 1
    after = node.sample(**inputs)
    assert len(host.placings) == 1
    assert torch.equal(before["result"][0]["samples"], after["result"][0]["samples"])
    assert after["result"][0].keys() == before["result"][0].keys()
    assert after["ui"]["text"][1:] == ["1 of 1 pictures kept from an earlier run"]
    # Another node of the same kind has pictures of its own.
    assert run("CascadeSampleStageB", **inputs)["ui"]["text"][1:] == []


def test_the_bundled_models_pictures_differ_by_rounding_alone():
    """What `docs/explore.md` says: a picture made beside others or after them, in 8 bits."""
    pipeline = CascadePipeline.load("tiny")
    texts = [stages.encode_text(pipeline.text_encoder, text) for text in ("a blue circle on a yellow background", "")]
    empty = stages.empty_latent(pipeline.stage_c, 0, 0, 3)
    settings = SamplingSettings(steps=4)
    prior = stages.sample_stage_c(pipeline.stage_c, *texts, empty, seed=0, settings=settings)
    run = StageBRun(prior, *texts, 0, settings)
    kept = FinishedPictures()
    for choice in ([0, 2], [0, 1, 2]):
        found = kept.plan(pipeline.stage_b, run.of(choice)).sample(pipeline.stage_b)
    pictures = [stages.decode_stage_a(pipeline.stage_a, latent) for latent in (found, run.sample(pipeline.stage_b))]
    first, second = (picture.mul(255).round() for picture in pictures)
    assert (first - second).abs().max() <= 1
    assert (first != second).float().mean() < 1e-3


def test_the_program_on_the_page_runs():
    page = (ROOT / "docs/explore.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(program.replace("steps=10", "steps=1"), names)
    assert names["pictures"].shape == (3, 256, 256, 3)
    assert list(names["finished"].plan(names["pipeline"].stage_b, names["run"]).kept) == [0, 1, 2]


def test_the_workflow_shows_twenty_numbered_pictures_and_finishes_some():
    graph = json.loads(written()["api/explore_then_finish.json"])
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert kinds["CascadeEmptyLatent"]["batch_size"] == 20
    assert kinds["CascadePreviewLatent"]["numbered"] is True
    assert graph[kinds["CascadeSampleStageB"]["latent"][0]]["class_type"] == "CascadeSelectLatents"
    latents = kinds["CascadeSelectLatents"]["latent"], kinds["CascadePreviewLatent"]["latent"]
    assert {graph[source]["class_type"] for source, _ in latents} == {"CascadeSampleStageC"}
