"""The CLIP image encoder sees what transformers' own preprocessing would show it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.vision import CLIP_MEAN, CLIP_STD, CROPS, clip_pixels, encode_pictures


def smooth(height, width, seed=0):
    """A picture of 8-bit colours with edges and gradients, ``[H, W, 3]``."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (250, 10, 90)
    return pixels


def as_batch(*pictures):
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]).float() / 255


def by_transformers(picture, **options):
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(**options)(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]


def assert_as_transformers(picture):
    pixels = clip_pixels(as_batch(picture))
    assert pixels.shape == (1, 3, 224, 224) and pixels.dtype == torch.float32
    assert (pixels - by_transformers(picture)).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (300, 517), (640, 233), (100, 60), (1024, 768)])
def test_pixels_are_those_of_transformers(size):
    assert_as_transformers(smooth(*size))


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (3, 2), (7, 5), (225, 223), (40, 1201), (1501, 50), (223, 1), (4, 99)]
)
def test_pixels_of_odd_wide_tall_and_tiny_pictures_too(size):
    rng = np.random.default_rng(0)
    assert_as_transformers(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


@settings(max_examples=40, deadline=None)
@given(short=st.integers(1, 260), ratio=st.floats(1, 8), tall=st.booleans(), seed=st.integers(0, 9))
def test_pixels_of_any_size_are_those_of_transformers(short, ratio, tall, seed):
    size = (int(short * ratio), short) if tall else (short, int(short * ratio))
    assert_as_transformers(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(50, 120), (333, 97), (5, 7)])
def test_stretching_is_resizing_without_a_crop(size):
    picture = smooth(*size)
    size = {"height": 224, "width": 224}
    assert (clip_pixels(as_batch(picture), crop="stretch") - by_transformers(picture, size=size)).abs().max() < 1e-3


# A border as wide as it should be: top, bottom, left and right of 28 pixels.
BORDERS = {(20, 40): (7, 7, 0, 0), (40, 20): (0, 0, 7, 7), (30, 28): (0, 0, 1, 1), (1, 56): (13, 14, 0, 0)}


@pytest.mark.parametrize("size", BORDERS)
def test_padding_shows_all_of_the_picture_in_the_middle(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    (pixels,) = clip_pixels(as_batch(picture), 28, "pad")
    top, bottom, left, right = BORDERS[size]
    inside = pixels[:, top : 28 - bottom, left : 28 - right]
    small = Image.fromarray(picture).resize(inside.shape[:0:-1], Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    assert (inside - (as_batch(np.array(small))[0] - mean) / std).abs().max() < 1e-5
    # The border is the mean colour, which is zero once it is normalised.
    rest = pixels.clone()
    rest[:, top : 28 - bottom, left : 28 - right] = 0
    assert not rest.any() and inside.abs().max() > 1


def test_crops_differ_on_a_wide_picture_and_agree_on_a_square():
    wide, square = as_batch(smooth(60, 150)), as_batch(smooth(77, 77))
    wides, squares = ([clip_pixels(pictures, 56, crop) for crop in CROPS] for pictures in (wide, square))
    assert all((first - second).abs().max() > 0.5 for first, second in pairwise([*wides, wides[0]]))
    assert all(torch.equal(first, second) for first, second in pairwise(squares))
    assert torch.equal(clip_pixels(wide, 56), wides[CROPS.index("center")])


def test_an_unknown_crop_is_refused():
    with pytest.raises(ValueError, match="crop is 'top', expected one of center, pad, stretch"):
        clip_pixels(torch.zeros(1, 3, 8, 8), crop="top")


def test_pictures_of_a_batch_do_not_touch_each_other():
    images = torch.stack([torch.from_numpy(smooth(90, 70, seed)).permute(2, 0, 1) for seed in (1, 2)]).float() / 255
    both = clip_pixels(images)
    assert torch.equal(both[1:], clip_pixels(images[1:]))
    assert (both[0] - both[1]).abs().max() > 0.5


def test_pixels_are_rounded_to_the_nearest_of_8_bits():
    exact = torch.from_numpy(smooth(40, 50)).permute(2, 0, 1)[None].float() / 255
    for shift in (-0.4, 0.4):
        assert torch.equal(clip_pixels((exact + shift / 255).clamp(0, 1)), clip_pixels(exact))


def test_another_shape_is_refused():
    for shape in ((64, 64, 3), (1, 4, 8, 8), (0, 3, 8, 8), (1, 3, 8, 0)):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
            clip_pixels(torch.zeros(shape))


def test_embedding_is_the_projected_state(small_family, tmp_path):
    from training_data_kit import small_models

    handle = load_stage(small_models(small_family, tmp_path).image_encoder, "image_encoder")
    images = torch.stack([torch.from_numpy(smooth(60, 80, seed)).permute(2, 0, 1) for seed in (3, 4)]).float() / 255
    embedding = encode_pictures(handle, images)
    assert embedding.shape == (2, 1, 24) and not embedding.requires_grad
    with torch.no_grad():
        hidden = handle.module.vision_model(clip_pixels(images, 28)).pooler_output
        expected = hidden @ handle.module.visual_projection.weight.T
    torch.testing.assert_close(embedding[:, 0], expected)
    assert (embedding[0] - embedding[1]).abs().max() > 1e-3
    with torch.no_grad():
        padded = handle.module(clip_pixels(images, 28, "pad")).image_embeds
    torch.testing.assert_close(encode_pictures(handle, images, "pad")[:, 0], padded)
    assert (padded - embedding[:, 0]).abs().max() > 1e-3


def test_the_tiny_familys_own_encoder_loads():
    from stable_cascade_nodes.cascade_ops.catalog import bundled

    handle = load_stage(bundled("image_encoder").path, "image_encoder")
    width = handle.module.config.projection_dim
    assert encode_pictures(handle, torch.rand(1, 3, 64, 64)).shape == (1, 1, width)
