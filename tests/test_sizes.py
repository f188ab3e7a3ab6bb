"""Latent sizes against the reference's numbers."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops import sizes

GOLDEN = json.loads((Path(__file__).parent / "data/golden/latent_sizes.json").read_text())
PIXELS = st.integers(1, 8192)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['width']}x{case['height']}")
def test_latent_sizes_match_the_reference(case):
    assert sizes.stage_c_size(case["height"], case["width"]) == tuple(case["stage_c"])
    assert sizes.stage_b_size(case["height"], case["width"]) == tuple(case["stage_b"])


@given(height=PIXELS, width=PIXELS)
def test_stage_b_latent_is_even_and_covers_the_picture(height, width):
    for latent, pixels in zip(sizes.stage_b_size(height, width), (height, width), strict=True):
        assert latent % 2 == 0
        assert 0 <= latent * 4 - pixels < 8


def test_height_comes_first():
    assert sizes.stage_c_size(1080, 1920) == (26, 45)
    assert sizes.stage_b_size(1001, 500) == (252, 126)
    assert sizes.picture_size(12, 24) == (512, 1024)
    assert sizes.encoder_picture_size(18, 24) == (576, 768)


@pytest.mark.parametrize("pixels", [256, 512, 768, 1024, 1280, 1536, 2048])
def test_a_picture_of_the_usual_sizes_survives_the_way_to_stage_c_and_back(pixels):
    assert sizes.picture_size(*sizes.stage_c_size(pixels, pixels)) == (pixels, pixels)


def test_an_empty_picture_is_refused():
    with pytest.raises(ValueError, match="0 x 64"):
        sizes.stage_c_size(64, 0)
