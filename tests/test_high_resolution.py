"""Large pictures through the nodes, and what the tiny family makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nodes_kit import load, run, sample_b

from stable_cascade_nodes.cascade_ops import stages
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.cascade_ops.wires import Latent, read_latent
from stable_cascade_nodes.nodes.sizes import ASPECTS
from stable_cascade_nodes.tiny.checker import read_picture
from stable_cascade_nodes.workflows.graphs.high_resolution import HIGH_RESOLUTION
from stable_cascade_nodes.workflows.write import writing


@pytest.fixture(scope="module")
def tiny_pipeline():
    return CascadePipeline.load("tiny")


# The wire ------------------------------------------------------------------------------------------------------------


def test_compression_travels_with_the_latent(handles):
    latent = stages.empty_latent(handles["stage_c"], 512, 384, 1, 85.34)
    assert latent.samples.shape == (1, 16, 5, 6)
    wire = latent.to_wire()
    assert wire["cascade_compression"] == 85.34
    assert read_latent(wire).stage_c_pixels() == (384, 512)
    # Without the key, as from other nodes, a latent is a picture of the published compression.
    assert "cascade_compression" not in stages.empty_latent(handles["stage_c"], 512, 384).to_wire()
    bare = {key: value for key, value in wire.items() if key != "cascade_compression"}
    assert read_latent(bare).stage_c_pixels() == (216, 256)


def test_the_compression_of_a_latent_that_was_resized_since_is_not_believed():
    wire = Latent(torch.zeros(1, 16, 60, 60), 4096, 4096, compression=68.27).to_wire()
    assert read_latent(wire).stage_c_pixels() == (4096, 4096)
    assert read_latent(wire | {"samples": torch.zeros(1, 16, 24, 48)}).stage_c_pixels() == (1024, 2048)


def test_sampling_keeps_the_compression_and_gives_the_pixels(host):
    latent = run("CascadeEmptyLatent", stage_c=load("CascadeLoadStageC"), width=512, height=384, batch_size=1,
                 compression=85.34)  # fmt: skip
    text = run("CascadeEncodeText", text_encoder=load("CascadeLoadTextEncoder"), text="a red circle")["result"][0]
    texts = {"positive": text, "negative": text, "seed": 0, "steps": 1, "guidance": 1.0, "sampler": "ddpm"}
    small = run("CascadeSampleStageC", stage_c=load("CascadeLoadStageC"), latent=latent["result"][0], **texts)
    assert small["result"][0]["samples"].shape == (1, 16, 5, 6)
    assert small["result"][0]["cascade_compression"] == 85.34
    said = run("CascadeSampleStageB", stage_b=load("CascadeLoadStageB"), latent=small["result"][0], **texts, window=256)
    assert said["result"][0]["samples"].shape == (1, 4, 96, 128)
    assert "512 x 384 pixels" in said["ui"]["text"][0]
    assert said["ui"]["text"][1] == "in 3 x 2 windows of 256 pixels at most"


# Nodes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def release(host):
    """A Stage C whose own size is that of the release."""
    handle = load("CascadeLoadStageC")
    return replace(handle, info=replace(handle.info, defaults=handle.info.defaults | {"width": 1024, "height": 1024}))


def propose(stage_c, aspect="1:1", megapixels=0.0, scale=1.0, **others):
    answer = run("CascadeProposeSize", stage_c=stage_c, aspect=aspect, megapixels=megapixels, scale=scale, **others)
    return answer["result"], answer["ui"]["text"]


def test_proposals(release):
    assert propose(release) == (
        (1024, 1024, 42.67),
        ["1024 x 1024 pixels, compression 42.67, Stage C 24 x 24"],
    )
    custom = {"aspect": "custom", "custom_width": 2560, "custom_height": 1440}
    assert propose(release, **custom)[1] == ["2560 x 1440 pixels, compression 42.67, Stage C 60 x 34"]
    assert propose(release, **custom, megapixels=1.0)[0][:2] == (1368, 768)
    assert propose(release, "16:9", megapixels=4.0)[0] == (2728, 1536, 45.47)
    assert propose(release, "9:16", megapixels=4.0)[0] == (1536, 2728, 45.47)
    assert propose(release, "16:9", multiple_of=64)[0][:2] == (1344, 768)
    (width, height, compression), said = propose(release, scale=4.0)
    assert (width, height, compression) == (4096, 4096, 68.27)
    assert said[1] == "Stage B was trained up to a compression of 64: expect fewer details"
    for aspect in ASPECTS:
        (width, height, _), _ = propose(release, aspect)
        wide, high = map(int, aspect.split(":"))
        assert abs(width / height - wide / high) < 0.02 * wide / high
        assert abs(width * height / 1024**2 - 1) < 0.02


def test_a_model_of_another_size_has_its_own_proposals(host):
    assert propose(load("CascadeLoadStageC"), "4:3", scale=4.0)[0] == (512, 384, 170.67)


def test_proposals_that_cannot_be_are_refused(release):
    for inputs, message in (
        ({"aspect": "custom"}, "its size is 0 x 0, expected both above 0"),
        ({"aspect": "custom", "custom_width": 64}, "its size is 64 x 0"),
        ({"custom_width": 64}, "no effect with the aspect 1:1: set both to 0"),
        ({"scale": 16.0, "megapixels": 4.0}, "32768 x 32768 pixels were asked for, expected sides of at most 16384"),
    ):
        with pytest.raises(ValueError, match=message):
            propose(release, **inputs)


def test_an_empty_latent_beyond_what_the_model_knows_says_so(release):
    inputs = {"stage_c": release, "width": 4096, "height": 2048, "batch_size": 1}
    said = run("CascadeEmptyLatent", **inputs)["ui"]["text"]
    assert "more than the 60 cells" in said[1] and "compression 68.27 avoids that" in said[1]
    said = run("CascadeEmptyLatent", **inputs, compression=68.27)["ui"]["text"]
    assert said == ["4096 x 2048 pixels, Stage C latent 60 x 30, batch of 1"]
    with pytest.raises(ValueError, match="The compression is 2, expected 0"):
        run("CascadeEmptyLatent", **inputs, compression=2.0)


def test_the_decoder_counts_tiles_and_can_be_stopped_at_each(host):
    detail, _ = sample_b(host)
    inputs = {"stage_a": load("CascadeLoadStageA"), "latent": detail["result"][0]}
    whole = run("CascadeDecodeStageA", **inputs)["result"][0]
    memory = host.placings[-1][1]
    host.seen.clear()
    tiled = run("CascadeDecodeStageA", **inputs, tile=32)["result"][0]
    assert (tiled - whole).abs().max() < 1e-5
    assert [entry[:2] for entry in host.seen] == [(number, 8) for number in range(1, 9)]
    assert 0 < host.placings[-1][1] < memory
    host.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run("CascadeDecodeStageA", **inputs, tile=32)


def test_the_encoder_in_tiles_is_the_encoder(host):
    inputs = {"stage_a": load("CascadeLoadStageA"), "image": torch.rand(2, 60, 100, 3)}
    whole = run("CascadeEncodeStageA", **inputs)["result"][0]
    assert whole["samples"].shape == (2, 4, 16, 26)
    assert [entry[:2] for entry in host.seen] == [(1, 2), (2, 2)]
    memory = host.placings[-1][1]
    host.seen.clear()
    tiled = run("CascadeEncodeStageA", **inputs, tile=32)["result"][0]
    assert (tiled["samples"] - whole["samples"]).abs().max() < 1e-5
    assert (tiled["width"], tiled["height"]) == (100, 60)
    assert [entry[:2] for entry in host.seen] == [(number, 16) for number in range(1, 17)]
    assert 0 < host.placings[-1][1] < memory


def test_the_pipeline_takes_compression_tiles_and_windows(tiny_pipeline):
    inputs = {"width": 320, "height": 256, "steps_c": 1, "steps_b": 1}
    plain = np.asarray(tiny_pipeline.generate("a red circle", **inputs)[0])
    tiled = np.asarray(tiny_pipeline.generate("a red circle", **inputs, tile=128)[0])
    assert plain.shape == (256, 320, 3) and np.abs(plain.astype(int) - tiled).max() <= 1
    for change in ({"compression": 64.0}, {"settings_b": SamplingSettings(window=256)}):
        other = np.asarray(tiny_pipeline.generate("a red circle", **inputs, **change)[0])
        assert other.shape == plain.shape and np.abs(plain.astype(int) - other).mean() > 0.1, change


def test_stage_b_reserves_memory_for_a_window_and_can_be_stopped_in_each(host, monkeypatch):
    latent = Latent(torch.randn(1, 16, 6, 6), 256, 256).to_wire()
    _, inputs = sample_b(host)
    inputs |= {"latent": latent}
    run("CascadeSampleStageB", **inputs)
    whole = host.placings[-1][1]
    run("CascadeSampleStageB", **inputs, window=64, window_overlap=16)
    assert host.placings[-1][1] < whole / 2
    asked = []

    def stop():
        asked.append(0)
        if len(asked) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(host, "check_interrupted", stop)
    with pytest.raises(KeyboardInterrupt):
        run("CascadeSampleStageB", **inputs, window=64)
    assert len(host.seen) < 100


# What the tiny family makes of it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_pipeline):
    pipeline = tiny_pipeline
    positive, negative = (
        stages.encode_text(pipeline.text_encoder, text) for text in ("a large red circle on a blue background", "")
    )
    latent = stages.empty_latent(pipeline.stage_c, 384, 384, 1, 64)
    prior = stages.sample_stage_c(
        pipeline.stage_c, positive, negative, latent, seed=2, settings=SamplingSettings(steps=8)
    )

    def picture(**settings):
        chosen = SamplingSettings(steps=6, **settings)
        detail = stages.sample_stage_b(pipeline.stage_b, prior, positive, negative, seed=2, settings=chosen)
        return stages.decode_stage_a(pipeline.stage_a, detail, tile=128)[0]

    return picture


def test_windows_leave_no_seams_and_change_no_content(tiny):
    whole, windowed = tiny(), tiny(window=256, window_overlap=128)
    for picture in (whole, windowed):
        reading = read_picture(np.asarray(picture))
        assert reading.background == "blue"
        assert [(each.colour, each.shape) for each in reading.objects] == [("red", "circle")]
    assert 10 * torch.log10(1 / (whole - windowed).square().mean()) > 25
    # The steps from one pixel to the next where one window ends or begins, against those of all other places.
    for axis in (0, 1):
        steps = windowed.diff(dim=axis).abs().mean(2).movedim(axis, 0)
        flat = steps.median(1).values  # of a row or column, most of which is plain background or object
        borders = torch.tensor([127, 128, 255, 256])
        others = torch.ones(len(flat), dtype=torch.bool)
        others[borders] = False
        assert flat[borders].max() <= flat[others].quantile(0.99)


# The example ---------------------------------------------------------------------------------------------------------


def test_the_proposed_size_goes_into_the_widgets_of_the_latent():
    with writing() as writer:
        latent = writer.api(HIGH_RESOLUTION)["9"]["inputs"]
        graph = writer.editor(HIGH_RESOLUTION)
    assert [latent[name] for name in ("width", "height", "compression")] == [["8", 0], ["8", 1], ["8", 2]]
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, output, target, slot, kind in graph["links"]:
        socket = nodes[target]["inputs"][slot]
        assert (socket["link"], socket["type"]) == (link, kind)
        assert link in nodes[source]["outputs"][output]["links"]
    assert [link[5] for link in graph["links"] if link[1] == 8] == ["INT", "INT", "FLOAT"]
    assert nodes[9]["widgets_values"] == [0, 0, 1, 0.0]
