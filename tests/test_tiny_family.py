"""The shipped family: small enough, complete, and its pictures follow their prompts."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from safetensors import safe_open

from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file
from stable_cascade_nodes.tiny.captions import caption_full
from stable_cascade_nodes.tiny.drawing import render, split_of
from stable_cascade_nodes.tiny.evaluate import (
    SEED,
    Family,
    as_pictures,
    measured_scenes,
    psnr,
    reconstruct,
    shares,
    table,
    text_to_image,
)
from stable_cascade_nodes.tiny.evaluate_adapters import MEASURES
from stable_cascade_nodes.tiny.family import WEIGHTS, as_images
from stable_cascade_nodes.tiny.recipe import ADAPTERS, PARTS
from stable_cascade_nodes.tiny.retrieval import retrieval


@pytest.fixture(scope="module")
def family() -> Family:
    return Family.load()


@pytest.fixture(scope="module")
def scenes():
    return measured_scenes(24, "test", 1)


def test_every_part_is_there_in_float16_and_says_what_it_is():
    there = {path.stem for path in WEIGHTS.glob("*.safetensors")}
    assert there == {*PARTS, *ADAPTERS}
    for stage in PARTS:
        info = inspect_file(WEIGHTS / f"{stage}.safetensors")
        assert (info.stage, info.size) == (stage, "tiny")
        assert "fp16" in info.dtypes and "fp32" not in info.dtypes


def test_all_of_it_stays_under_24_megabytes():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 24_000_000


def test_no_weight_is_lost_in_float16():
    for path in WEIGHTS.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                assert file.get_tensor(name).isfinite().all(), f"{path.name} {name}"


def test_pictures_follow_prompts_never_trained_on(family, scenes):
    right = shares(scenes, text_to_image(family, scenes, SEED))
    assert right["background"] >= 0.9
    assert right["colour"] >= 0.93
    assert right["size"] >= 0.9
    assert right["position"] >= 0.9
    assert right["shape"] >= 0.85
    assert right["all"] >= 0.75


def test_pictures_of_two_objects_have_two(family):
    two = measured_scenes(24, "test", 2)
    right = shares(two, text_to_image(family, two, SEED))
    assert right["count"] >= 0.87
    assert right["position"] >= 0.85


def test_pictures_depend_on_the_prompt(family, scenes):
    swapped = [*scenes[1:], scenes[0]]
    right = shares(swapped, text_to_image(family, scenes, SEED))
    assert right["colour"] < 0.5
    assert right["all"] < 0.1


def test_reconstruction_keeps_the_picture(family, scenes):
    truth = np.stack([render(scene) for scene in scenes])
    pictures = reconstruct(family, truth, SEED)
    assert psnr(pictures, truth) >= 24.5
    assert shares(scenes, pictures)["shape"] >= 0.85


@pytest.fixture(scope="module")
def measured(family):
    """Of 8 pictures of each kind."""

    @lru_cache
    def run(name):
        measure = MEASURES[name]
        return measure.run(family, WEIGHTS, WEIGHTS / f"{measure.file}.safetensors", 8)

    return run


@pytest.mark.parametrize(
    ("name", "measure", "with_it", "without"),
    [
        ("image_prompt", "object colour", 0.7, 0.4),
        ("image_prompt_and_words", "background colour", 0.8, 0.4),
        ("image_prompt_and_words", "position", 0.8, None),
        ("ip_adapter", "object colour", 0.7, 0.4),
        ("ip_adapter_and_words", "background colour", 0.7, 0.4),
        ("ip_adapter_and_words", "position", 0.8, None),
        ("lora", "the look", 0.8, 0.1),
        ("controlnet_canny", "F1 of edges", 0.6, 0.3),
        ("controlnet_inpainting", "PSNR outside", 28, None),
        ("controlnet_identity", "position", 0.6, 0.3),
        ("held_inpainting", "PSNR outside", 30, 27),
        ("held_inpainting", "colour asked for", 0.8, None),
        ("refined_super_resolution", "PSNR from 64 pixels,", 34, 33.5),
        ("refined_super_resolution", "PSNR from 128 pixels with noise", 28, 24),
        ("there_and_back", "PSNR", 21, 12),
    ],
)
def test_a_feature_does_what_it_is_for(measured, name, measure, with_it, without):
    """A small version of the table in docs/tiny/adapters.md."""
    row = next(row for row in measured(name).rows if row.measure.startswith(measure))
    assert row.with_it >= with_it
    assert without is None or row.without <= without


@torch.no_grad()
def test_stage_a_alone(family, scenes):
    truth = np.stack([render(scene) for scene in scenes[:8]])
    decoded = family.stage_a.decode(family.stage_a.encode(as_images(truth))[0])
    assert psnr(as_pictures(decoded), truth) >= 33


def test_captions_find_their_pictures():
    assert retrieval(WEIGHTS, groups=1) >= 0.93


def test_measured_scenes_are_no_training_scenes():
    for split, objects in (("test", 1), ("test", 2), ("held_out", 1)):
        chosen = measured_scenes(5, split, objects)
        assert [caption_full(s) for s in chosen] == [caption_full(s) for s in measured_scenes(5, split, objects)]
        assert all(len(scene.objects) == objects and split_of(scene) == split for scene in chosen)


def test_table_shows_shares_and_decibels():
    text = table({"a": {"background": 0.5, "count": 0.915, "all": 1.0}, "b": {"psnr": 30.04}})
    assert text.splitlines()[2] == "| a | 0.50 |  | 0.915 |  |  |  |  |  | 1.00 |  |"
    assert text.splitlines()[3].endswith("| 30.0 dB |")
