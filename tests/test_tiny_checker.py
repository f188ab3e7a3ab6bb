"""The checker reads drawn pictures, clean and spoiled, and scores readings attribute by attribute."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from stable_cascade_nodes.tiny.checker import ObjectReading, Reading, colour_name, components, read_picture, score
from stable_cascade_nodes.tiny.drawing import COLOURS, SHAPES, Scene, SceneObject, position_name, random_scene, render


def jpeg(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=30)
    return np.asarray(Image.open(buffer))


def blurred(radius):
    return lambda picture: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noisy(picture):
    noise = np.random.default_rng(0).normal(0, 0.05, picture.shape)
    return np.clip(picture / 255 + noise, 0, 1)


SPOILERS = {"clean": lambda p: p, "float": lambda p: p / 255, "jpeg": jpeg, "noise": noisy, "blur": blurred(3)}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
@pytest.mark.parametrize(("split", "objects", "least"), [("train", 1, 0.97), ("train", 2, 0.93), ("held_out", 1, 0.97)])
def test_drawn_pictures_are_read_right(spoil, split, objects, least):
    rng = np.random.default_rng(11)
    drawn = [random_scene(rng, split, objects) for _ in range(60)]
    right = [score(scene, read_picture(spoil(render(scene))))["all"] for scene in drawn]
    assert np.mean(right) >= least


def test_a_strong_blur_costs_little():
    rng = np.random.default_rng(12)
    drawn = [random_scene(rng, "train", 1) for _ in range(60)]
    right = [score(scene, read_picture(blurred(6)(render(scene))))["all"] for scene in drawn]
    assert np.mean(right) >= 0.97


def item(shape="circle", colour="red", size="small", x=0.25, y=0.25):
    radius = 0.16 if size == "small" else 0.28
    return SceneObject(shape, colour, size, position_name(x, y), x, y, radius, COLOURS[colour])


def scene_of(*objects, background="blue", **options):
    return Scene(background, COLOURS[background], objects, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_told_from_the_others_at_other_picture_sizes(shape):
    for side in (128, 192, 300):
        for size in ("small", "large"):
            reading = read_picture(render(scene_of(item(shape, size=size, x=0.5, y=0.5)), side))
            assert [(o.shape, o.size, o.position) for o in reading.objects] == [(shape, size, "centre")]


def test_each_attribute_is_scored_on_its_own():
    truth = scene_of(item())
    reading = read_picture(render(truth))
    assert set(score(truth, reading).values()) == {True}
    changes = {
        "colour": scene_of(item(colour="green")),
        "shape": scene_of(item(shape="star")),
        "size": scene_of(replace(item(), size="large")),
        "position": scene_of(replace(item(), position="right")),
        "background": scene_of(item(), background="black"),
    }
    for wrong, other in changes.items():
        result = score(other, reading)
        missed = ["background", "background colour"] if wrong == "background" else [wrong]
        assert [name for name, right in result.items() if not right] == [*missed, "all"]
        assert result[wrong] is False


def test_a_wrong_number_of_objects():
    two = scene_of(item(), item("star", "yellow", x=0.75, y=0.75))
    missing = score(two, read_picture(render(scene_of(item()))))
    assert missing == dict.fromkeys(missing, False) | {"background": True, "background colour": True}
    extra = score(scene_of(item()), read_picture(render(two)))
    assert extra["count"] is False
    assert extra["all"] is False
    assert extra["colour"] and extra["shape"]


def test_attributes_of_two_objects_must_not_be_swapped():
    truth = scene_of(item("circle", "red"), item("star", "yellow", x=0.75, y=0.75))
    swapped = scene_of(item("circle", "yellow"), item("star", "red", x=0.75, y=0.75))
    assert score(truth, read_picture(render(truth)))["all"]
    result = score(truth, read_picture(render(swapped)))
    assert result["count"]
    assert not result["colour"]


def test_objects_that_touch_are_told_apart_by_colour():
    touching = scene_of(item("square", "red", x=0.3, y=0.5), item("square", "yellow", x=0.3 + 0.32 * 0.88, y=0.5))
    reading = read_picture(render(touching))
    assert sorted(o.colour for o in reading.objects) == ["red", "yellow"]
    assert {o.shape for o in reading.objects} == {"square"}


def test_an_empty_picture_has_no_objects():
    reading = read_picture(np.full((64, 64, 3), COLOURS["green"], dtype=np.uint8))
    assert reading == Reading("green", "plain", "", ())
    result = score(scene_of(item(), background="green"), reading)
    assert [name for name, right in result.items() if right] == ["background", "background colour"]


@pytest.mark.parametrize("horizontal", [True, False])
@pytest.mark.parametrize("pattern", ["striped", "graded"])
def test_patterned_backgrounds_are_named(pattern, horizontal):
    drawn = scene_of(item(colour="green"), background="white", pattern=pattern, second="purple", horizontal=horizontal)
    reading = read_picture(render(drawn))
    assert (reading.pattern, {reading.background, reading.second}) == (pattern, {"white", "purple"})
    plain = score(replace(drawn, pattern="plain", second=""), reading)
    assert plain["background"] is False
    assert plain["background colour"] is False  # the second colour is not in that scene
    plain_reading = replace(reading, pattern="plain", second="")
    missed_pattern = score(drawn, plain_reading)
    assert missed_pattern["background"] is False
    assert missed_pattern["background colour"] is True


def test_every_named_colour_is_its_own_nearest():
    assert [colour_name(np.array(rgb)) for rgb in COLOURS.values()] == list(COLOURS)


def test_components_join_over_corners_and_around_bends():
    mask = np.array(
        [
            [1, 0, 1, 0, 0, 1],
            [1, 0, 1, 0, 1, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 1],
        ],
        dtype=bool,
    )
    parts = components(mask)
    assert sorted(int(part.sum()) for part in parts) == [1, 2, 7]
    assert (np.sum(parts, axis=0) == mask).all()


def test_noise_of_a_few_pixels_is_no_object():
    picture = render(scene_of(item()))
    picture[200:210, 200:210] = 255
    assert len(read_picture(picture).objects) == 1


def test_a_picture_of_another_layout_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\), expected \[H, W, 3\]"):
        read_picture(np.zeros((3, 64, 64)))


def test_readings_are_plain_values():
    reading = read_picture(render(scene_of(item())))
    assert isinstance(reading.objects[0], ObjectReading)
    assert 0.9 < reading.objects[0].overlap <= 1
