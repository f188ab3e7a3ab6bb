"""Aspect-ratio buckets fit every stage, and pictures land in the nearest one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stable_cascade_nodes.cascade_ops.sizes import stage_c_size
from stable_cascade_nodes.cascade_ops.training.data.buckets import Bucket, make_buckets, nearest_bucket
from stable_cascade_nodes.cascade_ops.training.data.pictures import as_tensor, crop_to
from stable_cascade_nodes.cascade_ops.training.settings import Data

RATIOS = st.lists(st.floats(0.2, 5.0), min_size=1, max_size=12)


@pytest.mark.parametrize(("side", "encoder", "cells"), [(256, 192, 6), (512, 384, 12), (768, 576, 18), (1024, 768, 24)])
def test_squares_of_the_usual_sizes_are_exact(side, encoder, cells):
    (bucket,) = make_buckets(side, [1.0])
    assert bucket == Bucket(side, side, cells, cells)
    assert bucket.encoder_size == (encoder, encoder)


@given(st.integers(32, 2048), RATIOS)
def test_every_bucket_fits_every_stage(resolution, ratios):
    buckets = make_buckets(resolution, ratios)
    assert 1 <= len(buckets) <= len(ratios) and len(set(buckets)) == len(buckets)
    for bucket in buckets:
        # Stage B takes multiples of 8; what sampling makes of the picture's size is what is trained on.
        assert bucket.width % 8 == 0 and bucket.height % 8 == 0
        assert stage_c_size(bucket.height, bucket.width) == (bucket.latent_height, bucket.latent_width)
        assert bucket.encoder_size == (32 * bucket.latent_height, 32 * bucket.latent_width)


@given(st.integers(512, 2048), st.floats(0.4, 2.5))
def test_area_and_ratio_are_about_those_asked_for(resolution, ratio):
    (bucket,) = make_buckets(resolution, [ratio])
    # Half a cell either way on the shorter side, which has at least 7 of them.
    assert abs(math.log(bucket.width * bucket.height / resolution**2)) < 0.16
    assert abs(math.log(bucket.width / bucket.height / ratio)) < 0.16


@given(st.integers(1, 4000), st.integers(1, 4000), RATIOS)
def test_a_picture_gets_the_shape_that_is_nearest_to_its_own(width, height, ratios):
    buckets = make_buckets(512, ratios)
    chosen = buckets[nearest_bucket(width, height, buckets)]
    distance = abs(math.log(chosen.width / chosen.height * height / width))
    assert all(distance <= abs(math.log(b.width / b.height * height / width)) + 1e-9 for b in buckets)


def test_the_default_ratios_give_as_many_shapes():
    assert len(make_buckets(1024, Data().buckets)) == len(Data().buckets)
    # At 256 pixels there are too few cells to tell all ratios apart.
    assert {(b.latent_width, b.latent_height) for b in make_buckets(256, [4 / 5, 3 / 4])} == {(5, 7)}


@pytest.mark.parametrize(
    ("resolution", "ratios", "message"),
    [(16, [1.0], "resolution is 16"), (256, [], "no buckets"), (256, [0.01], "0.01"), (256, [30.0], "30")],
)
def test_what_makes_no_buckets_is_refused(resolution, ratios, message):
    with pytest.raises(ValueError, match=message):
        make_buckets(resolution, ratios)


def ramp(width, height):
    """A picture whose red grows to the right and whose green grows downwards, evenly."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack([np.tile(across, (height, 1)), np.tile(down[:, None], (1, width)), np.zeros((height, width))], 2)
    return Image.fromarray(pixels.round().astype(np.uint8))


@given(st.integers(30, 400), st.integers(30, 400), st.integers(2, 20), st.integers(2, 20))
def test_a_cropped_picture_has_the_buckets_size_and_keeps_its_proportions(width, height, columns, rows):
    image, crop = crop_to(ramp(width, height), columns * 8, rows * 8)
    assert image.size == (columns * 8, rows * 8)
    kept = crop.width * width / (crop.height * height)
    assert kept == pytest.approx(columns / rows)
    assert max(crop.width, crop.height) == pytest.approx(1)
    assert crop.left == pytest.approx((1 - crop.width) / 2) and crop.top == pytest.approx((1 - crop.height) / 2)


def test_the_place_of_the_crop_is_the_one_asked_for():
    picture = ramp(400, 100)
    left, middle, right = (as_tensor(crop_to(picture, 96, 96, across)[0])[0].mean().item() for across in (0, 0.5, 1))
    assert left == pytest.approx(0.125, abs=0.01)
    assert middle == pytest.approx(0.5, abs=0.01)
    assert right == pytest.approx(0.875, abs=0.01)


def test_a_picture_of_the_right_size_is_not_touched():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    assert torch.equal(as_tensor(crop_to(picture, 128, 96)[0]), as_tensor(picture))


def test_shrinking_does_not_alias():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128))[..., None].repeat(3, 2))
    small = as_tensor(crop_to(stripes, 64, 64)[0])
    # Every pixel of the small picture is the mean of black and white stripes.
    assert (small[:, 8:-8, 8:-8] - 0.5).abs().max() < 0.02
