"""The CLIP image encoder sees what transformers' own preprocessing would show it."""

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.vision import clip_pixels, encode_pictures


def smooth(height, width, seed=0):
    """A picture of 8-bit colours with edges and gradients, ``[H, W, 3]``."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (250, 10, 90)
    return pixels


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (300, 517), (640, 233), (100, 60), (1024, 768)])
def test_pixels_are_those_of_transformers(size):
    from transformers import CLIPImageProcessor

    picture = smooth(*size)
    expected = CLIPImageProcessor()(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    pixels = clip_pixels(images)
    assert pixels.shape == (1, 3, 224, 224) and pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() < 1e-3


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
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        clip_pixels(torch.zeros(64, 64, 3))


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


def test_the_tiny_familys_own_encoder_loads():
    from stable_cascade_nodes.cascade_ops.catalog import bundled

    handle = load_stage(bundled("image_encoder").path, "image_encoder")
    width = handle.module.config.projection_dim
    assert encode_pictures(handle, torch.rand(1, 3, 64, 64)).shape == (1, 1, width)
