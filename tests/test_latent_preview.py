"""Rough previews from one matrix."""

import pytest
import torch

from stable_cascade_nodes.cascade_ops.latent_preview import PreviewMap, preview_map
from stable_cascade_nodes.tiny import fit_previews


@pytest.fixture(scope="module")
def drawn():
    images = fit_previews.pictures("test", 12)
    return images, fit_previews.latents(images)


@pytest.mark.parametrize(("stage", "most"), [("stage_c", 30), ("stage_b", 5)])
def test_tiny_maps_show_the_colours(drawn, stage, most):
    images, latents = drawn
    found = preview_map("tiny", stage)
    assert fit_previews.error(found, latents[stage], images) < most
    # One colour for all of a picture is far off, so the map shows what is where.
    flat = PreviewMap(torch.zeros_like(found.weight), images.mean((0, 2, 3)))
    assert fit_previews.error(flat, latents[stage], images) > 2 * most
    shown = found.show(latents[stage])
    assert shown.shape == (12, 256, 256, 3) and shown.min() >= 0 and shown.max() <= 1


def test_a_fit_finds_the_map_that_made_the_colours():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(5, 4, 6, 6, generator=generator)
    made = PreviewMap(torch.randn(4, 3, generator=generator) * 0.05, torch.tensor([0.4, 0.5, 0.6]))
    images = made.colours(samples).permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = fit_previews.fit(samples, images)
    assert torch.allclose(found.weight, made.weight, atol=1e-5) and torch.allclose(found.bias, made.bias, atol=1e-5)


def test_which_maps_there_are():
    for family in ("tiny", "release"):
        for stage, channels in (("stage_c", 16), ("stage_b", 4)):
            assert preview_map(family, stage).weight.shape == (channels, 3)
    assert preview_map("", "stage_c") is None and preview_map("tiny", "stage_a") is None


def test_size_of_a_preview():
    found = preview_map("release", "stage_c")
    assert found.show(torch.zeros(1, 16, 24, 32)).shape == (1, 192, 256, 3)
    assert found.show(torch.zeros(2, 16, 300, 10)).shape == (2, 300, 10, 3)
    # Nothing is the middle between black and white.
    assert torch.allclose(found.show(torch.zeros(1, 16, 4, 4)), torch.tensor(0.5))
