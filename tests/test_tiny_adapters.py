"""How the adapters of the tiny family are measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stable_cascade_nodes.tiny import adapter_inputs as inputs
from stable_cascade_nodes.tiny import evaluate_adapters
from stable_cascade_nodes.tiny.captions import background_phrase, caption_full, unplaced
from stable_cascade_nodes.tiny.drawing import HELD_OUT_PAIRS, random_scene, render
from stable_cascade_nodes.tiny.evaluate import measured_scenes
from stable_cascade_nodes.tiny.evaluate_adapters import table
from stable_cascade_nodes.tiny.looks import TOKEN, look_scene, render_look
from stable_cascade_nodes.tiny.measuring import Row, nothing
from stable_cascade_nodes.tiny.objects import WIDTH, object_embedding


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(3)
    return [random_scene(rng, objects=1) for _ in range(6)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return np.stack([render(scene) for scene in scenes])


def test_edges_are_found_where_they_are(scenes, pictures):
    assert inputs.edge_f1(pictures, pictures) == 1
    assert inputs.edge_f1(np.roll(pictures, 3, axis=2), pictures) > 0.9  # a little aside is still there
    assert inputs.edge_f1(np.roll(pictures, 40, axis=2), pictures) < 0.7
    assert inputs.edge_f1(np.full_like(pictures, 90), pictures) == 0
    # Recall alone is not enough: edges everywhere are wrong.
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape).astype(np.uint8)
    assert inputs.edge_f1(noise, pictures) < 0.5


def test_decibels_of_a_part():
    truth = np.zeros((1, 4, 4, 3), np.uint8)
    other = truth.copy()
    other[0, 0] = 255
    where = np.ones((1, 4, 4), bool)
    where[0, 0] = False
    assert inputs.psnr_where(other, truth, where) == pytest.approx(90)
    assert inputs.psnr_where(other, truth, ~where) == pytest.approx(0)


def test_a_mask_hides_the_object_and_little_else(scenes, pictures):
    for scene, picture in zip(scenes, pictures, strict=True):
        mask = inputs.object_mask(scene)
        plain = render(replace(scene, objects=()))
        assert (picture[~mask] == plain[~mask]).all()
        assert mask.mean() < (2 * scene.objects[0].radius + 0.11) ** 2


def test_the_object_asked_for_is_another_one_in_the_same_place(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes * 5:
        other, item = inputs.other_object(scene, rng).objects[0], scene.objects[0]
        assert other.colour not in (item.colour, scene.background, scene.second)
        assert other.shape != item.shape
        assert (other.colour, other.shape) not in HELD_OUT_PAIRS
        assert (other.box, other.size, other.position) == (item.box, item.size, item.position)


def test_controls_have_the_form_that_was_trained_on(scenes, pictures):
    assert inputs.edges_of(pictures).shape == (6, 1, 192, 192)
    masks = np.stack([inputs.object_mask(scene) for scene in scenes])
    control = inputs.masked(pictures, masks)
    assert control.shape == (6, 4, 192, 192)
    assert control[:, 3].mean().item() == pytest.approx(masks.mean(), abs=0.02)
    assert (control[:, :3].amin(dim=1)[control[:, 3] == 1] == 1).all()
    maps = inputs.identities(scenes)
    assert maps.shape == (6, WIDTH, 6, 6)
    item = scenes[0].objects[0]
    column, row = int(item.x * 6), int(item.y * 6)
    expected = torch.tensor(object_embedding(item.colour, item.shape))
    assert torch.allclose(maps[0, :, row, column], expected, atol=1e-4)


def oracle(truth, blank):
    """A chain that makes the truth with an adapter and grey pictures without."""

    def chain(family, prompts, seed, attach=nothing):
        oracle.prompts = prompts
        return truth(len(prompts)) if attach is not nothing else blank(len(prompts))

    return chain


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        ("canny_edges", unplaced),
        ("identity", background_phrase),
        ("super_resolution", lambda scene: ""),
    ],
)
def test_a_perfect_adapter_gets_full_marks_and_none_gets_few(measure, says, monkeypatch, tmp_path):
    def truth(count):
        return np.stack([render(scene) for scene in measured_scenes(count, "test", 1)])

    monkeypatch.setattr(evaluate_adapters, "chain", oracle(truth, lambda n: np.full((n, 256, 256, 3), 100, np.uint8)))
    monkeypatch.setattr(evaluate_adapters, "steered_by", lambda path, control: "steered")
    monkeypatch.setattr(evaluate_adapters, "enlarged", lambda encoder, small: small)
    family = type("Family", (), {"encoder": None})
    measured = getattr(evaluate_adapters, measure)(family, tmp_path, tmp_path, 4)
    assert oracle.prompts == [says(scene) for scene in measured_scenes(4, "test", 1)]
    for row in measured.rows:
        assert row.with_it == (90 if row.unit == "dB" else 1)
        assert row.without < 90 if row.unit == "dB" else row.without <= 1
    if measure != "super_resolution":  # bicubic enlargement keeps what a picture shows
        assert all(row.without < 0.5 for row in measured.rows)


def test_inpainting_looks_outside_for_the_old_and_inside_for_the_new(monkeypatch, tmp_path):
    rng = np.random.default_rng(evaluate_adapters.SEED)
    old = measured_scenes(4, "test", 1)
    new = [inputs.other_object(scene, rng) for scene in old]

    def pictures(scenes):
        return lambda count: np.stack([render(scene) for scene in scenes])

    monkeypatch.setattr(evaluate_adapters, "chain", oracle(pictures(new), pictures(old)))
    monkeypatch.setattr(evaluate_adapters, "steered_by", lambda path, control: "steered")
    rows = evaluate_adapters.inpainting(None, tmp_path, tmp_path, 4).rows
    assert oracle.prompts == [caption_full(scene) for scene in new]
    assert [row.with_it for row in rows] == [90, 1, 1]
    assert [row.without for row in rows] == [90, 0, 0]


def test_the_look_is_asked_for_with_its_word_alone(monkeypatch):
    rng = np.random.default_rng(evaluate_adapters.SEED)
    scenes = [look_scene(rng, "test") for _ in range(3)]
    asked = []

    def chain(family, prompts, seed):
        asked.append((family, [TOKEN in prompt for prompt in prompts]))
        make = render_look if family == "adapted" and TOKEN in prompts[0] else render
        return np.stack([make(scene) for scene in scenes])

    fake = {
        "chain": chain,
        "load_stage": lambda *given, **more: type("Handle", (), {"module": None}),
        "read_lora": lambda path, module: type("LoRA", (), {"tokens": ()}),
        "apply_lora": lambda handle, learned: (type("Handle", (), {"module": "changed"}), None),
        "with_tokens": lambda handle, tokens: type("Handle", (), {"module": "text"}),
        "replace": lambda family, **parts: "adapted",
    }
    for name, value in fake.items():
        monkeypatch.setattr(evaluate_adapters, name, value)
    rows = evaluate_adapters.lora("base", *map(type(evaluate_adapters.WEIGHTS), ("weights", "lora")), 3).rows
    assert [(row.with_it, row.without) for row in rows] == [(1, 0), (1, 0)]
    assert asked == [("adapted", [True] * 3), ("adapted", [False] * 3), ("base", [True] * 3)]


def test_the_table_has_both_figures_and_the_goal():
    rows = [Row("canny", "F1", 0.756, 0.2, ".70 / .30"), Row("inpainting", "PSNR", 26.04, None, "26 dB", "dB")]
    lines = table(rows).splitlines()
    assert lines[2] == "| canny | F1 | 0.76 | 0.20 | .70 / .30 |"
    assert lines[3] == "| inpainting | PSNR | 26.0 dB |  | 26 dB |"
