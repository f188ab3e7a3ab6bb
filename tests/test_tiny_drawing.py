"""Scenes, their pictures, their words."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stable_cascade_nodes.tiny.captions import _SHAPES, _SIZES, caption, caption_full, describe
from stable_cascade_nodes.tiny.drawing import (
    COLOURS,
    HELD_OUT_PAIRS,
    POSITION_NAMES,
    RADIUS_LIMIT,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    position_name,
    random_scene,
    render,
    rgb_to_lab,
    signed_distance,
    split_of,
)


def scenes(split="train", count=300, seed=3, **options):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, split, **options) for _ in range(count)]


def one(shape="circle", x=0.5, y=0.5, radius=0.28, rgb=(200, 0, 0), background=(0, 0, 200)):
    item = SceneObject(shape, "red", "large", position_name(x, y), x, y, radius, rgb)
    return Scene("blue", background, (item,))


def test_a_seed_fixes_the_scene():
    assert scenes(count=20) == scenes(count=20)
    assert scenes(count=20) != scenes(count=20, seed=4)


def test_names_agree_with_the_geometry():
    for scene in scenes():
        for item in scene.objects:
            assert position_name(item.x, item.y) == item.position
            assert (item.radius > RADIUS_LIMIT) == (item.size == "large")
            assert item.radius >= 0.14
            assert min(item.box) > 0.01
            assert max(item.box) < 0.99
            assert item.colour not in (scene.background, scene.second)
            assert np.abs(np.subtract(item.rgb, COLOURS[item.colour])).max() <= 5


def test_two_objects_lie_apart_in_different_places_and_colours():
    pairs = [s.objects for s in scenes(objects=2)]
    assert {len(p) for p in pairs} == {2}
    for a, b in pairs:
        apart = max(b.box[0] - a.box[2], a.box[0] - b.box[2], b.box[1] - a.box[3], a.box[1] - b.box[3])
        assert apart > 0.01
        assert a.colour != b.colour
        assert a.position != b.position


def test_the_mixture_of_scenes():
    found = scenes(count=1500)
    two = np.mean([len(s.objects) == 2 for s in found])
    plain = np.mean([s.pattern == "plain" for s in found])
    assert 0.25 < two < 0.35
    assert 0.75 < plain < 0.86
    singles = [s.objects[0] for s in found if len(s.objects) == 1]
    for field, names in (("shape", SHAPES), ("size", SIZES), ("colour", COLOURS), ("position", POSITION_NAMES)):
        share = [np.mean([getattr(o, field) == name for o in singles]) for name in names]
        assert min(share) > 0.5 / len(names), field


def test_the_splits_are_disjoint():
    found = {split: scenes(split, 400) for split in ("train", "test", "held_out")}
    for split, members in found.items():
        assert {split_of(s) for s in members} == {split}
    pairs = {s: {(o.colour, o.shape) for scene in found[s] for o in scene.objects} for s in found}
    assert not pairs["train"] & HELD_OUT_PAIRS
    assert not pairs["test"] & HELD_OUT_PAIRS
    assert pairs["held_out"] == HELD_OUT_PAIRS
    assert not {s.key for s in found["train"]} & {s.key for s in found["test"]}


def test_the_split_does_not_depend_on_jitter_or_the_order_of_objects():
    for scene in scenes("test", 50, objects=2):
        moved = tuple(replace(o, x=o.x + 0.001, rgb=(1, 2, 3)) for o in reversed(scene.objects))
        assert split_of(replace(scene, objects=moved)) == "test"


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected one of train, test, held_out"):
        random_scene(np.random.default_rng(0), "validation")


def test_lab_of_known_colours():
    lab = rgb_to_lab(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 0], [0, 0, 255]]))
    # Published values for D65 sRGB primaries.
    assert np.allclose(lab, [[100, 0, 0], [53.24, 80.09, 67.20], [0, 0, 0], [32.30, 79.19, -107.86]], atol=0.1)


def test_named_colours_are_far_apart():
    lab = rgb_to_lab(np.array(list(COLOURS.values())))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab)) * 1000
    assert distance.min() > 40


@pytest.mark.parametrize(
    ("shape", "area"),
    # Areas of the outlines by elementary geometry, in units of the squared radius.
    [
        ("circle", np.pi),
        ("square", 4 * 0.88**2),
        ("triangle", 2 * 1.85 / 2),
        ("cross", 4 * 0.6 * 0.7 + 0.36),
        ("ring", np.pi * (1 - 0.52**2)),
    ],
)
def test_rendered_coverage_is_the_area_of_the_shape(shape, area):
    scene = one(shape, x=0.5013, y=0.4987, rgb=(255, 255, 255), background=(0, 0, 0))
    coverage = render(scene)[..., 0].mean() / 255
    assert coverage == pytest.approx(area * 0.28**2, rel=0.01)


def test_the_star_has_five_points_up():
    angles = np.linspace(0, 2 * np.pi, 3600, endpoint=False)
    x, y = 0.8 * np.sin(angles), -0.8 * np.cos(angles)
    inside = signed_distance("star", x, y) < 0
    assert np.count_nonzero(np.diff(inside.astype(int)) == 1) + (inside[0] and not inside[-1]) == 5
    assert (
        signed_distance("star", np.array(0.0), np.array(-0.8))
        < 0
        < signed_distance("star", np.array(0.0), np.array(0.8))
    )


def test_polygon_distance_is_the_distance():
    corner = signed_distance("square", np.array([2.0, 0.0, 0.0]), np.array([2.0, 0.0, 2.0]))
    assert corner == pytest.approx([np.hypot(1.12, 1.12), -0.88, 1.12])


def test_rendered_pixels():
    picture = render(one("square", x=0.5, y=0.5, radius=0.25))
    assert picture.shape == (256, 256, 3)
    assert picture.dtype == np.uint8
    assert picture[128, 128].tolist() == [200, 0, 0]
    assert picture[0, 0].tolist() == [0, 0, 200]
    # Half a side is .88 * .25 * 256 = 56.32 pixels: .32 of the pixel at 71 is covered.
    assert picture[128, 71].tolist() == [64, 0, 136]


def test_outlines_are_anti_aliased_alike_at_every_size():
    for scene in scenes(count=20):
        large = Image.fromarray(render(scene, 512)).reduce(4)
        assert np.abs(np.asarray(large, float) - render(scene, 128)).mean() < 0.6


def test_patterned_backgrounds():
    item = one().objects[0]
    striped = render(Scene("white", (255, 255, 255), (item,), "striped", "black", horizontal=True))
    changes = np.count_nonzero(np.diff((striped[:, 2, 0] > 128).astype(int)))
    assert changes == 5
    assert (striped[:, 2] == striped[:, 250]).all()
    graded = render(Scene("white", (255, 255, 255), (item,), "graded", "black", horizontal=False))
    line = graded[2, :, 0].astype(int)
    assert (np.diff(line) <= 0).all()
    assert line[0] > 250
    assert line[-1] < 25


def test_the_canonical_caption():
    assert caption_full(one(x=0.25, y=0.25)) == "a large red circle at the top left on a blue background"
    for scene in scenes(count=100):
        text = caption_full(scene)
        for item in scene.objects:
            assert f"{item.size} {item.colour} {item.shape}" in text
        assert scene.background in text
        assert scene.second in text


def test_captions_say_what_they_claim_and_nothing_else():
    rng = np.random.default_rng(0)
    size_words = {word for words in _SIZES.values() for word in words}
    place_words = {"top", "left", "right", "bottom", "centre", "center", "middle", "upper", "lower"}
    dropped = {"sizes": 0, "positions": 0, "background": 0}
    for scene in scenes(count=600):
        said = describe(scene, rng)
        words = set(said.text.replace(",", "").split())
        for item in scene.objects:
            assert item.colour in words
            assert any(name in said.text for name in _SHAPES[item.shape])
        assert bool(words & size_words) == said.names_sizes
        assert bool(words & place_words) == said.names_positions
        assert (scene.background in words) == said.names_background
        order = [said.text.index(o.colour) for o in said.objects]
        assert order == sorted(order)
        dropped["sizes"] += not said.names_sizes
        dropped["positions"] += not said.names_positions
        dropped["background"] += not said.names_background
    assert 30 < dropped["sizes"] < 100
    assert 30 < dropped["positions"] < 100
    assert 10 < dropped["background"] < 60


def test_wording_varies():
    rng = np.random.default_rng(0)
    scene = scenes(count=1, objects=2)[0]
    assert len({caption(scene, rng) for _ in range(40)}) > 30
    assert len({describe(scene, rng).objects for _ in range(40)}) == 2
