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


# Compression ---------------------------------------------------------------------------------------------------------

SIDES = st.integers(1, 16384)
KNOWN = st.sampled_from([sizes.RELEASE_CELLS, (6, 6), (3, 3)])


@given(height=SIDES, width=SIDES, cells=KNOWN)
def test_the_proposed_compression_keeps_stage_c_in_the_range_that_it_knows(height, width, cells):
    compression = sizes.proposed_compression(height, width, cells)
    assert compression >= 32 and compression == round(compression, 2)
    longest = max(sizes.stage_c_size(height, width, compression))
    published = max(sizes.stage_c_size(height, width))
    assert longest <= cells[1]
    if longest < cells[0]:
        assert compression == 32  # as low as Stage B knows
    if cells[0] <= published <= cells[1]:
        assert compression == 42.67
    elif published > cells[1]:
        assert compression > 42.67 and longest == cells[1]
        assert max(sizes.stage_c_size(height, width, compression - 0.02)) >= cells[1]
    else:
        assert compression < 42.67


def test_every_longer_side_up_to_the_largest_fits():
    for side in range(1, 16385):
        assert max(sizes.stage_c_size(8, side, sizes.proposed_compression(8, side))) <= 60, side


@pytest.mark.parametrize(
    ("width", "height", "compression", "stage_c"),
    [
        (1024, 1024, 42.67, (24, 24)),
        (2560, 1440, 42.67, (34, 60)),
        (2568, 1440, 42.8, (34, 60)),
        (3840, 2160, 64.0, (34, 60)),
        (4096, 4096, 68.27, (60, 60)),
        (768, 512, 32.0, (16, 24)),
        (900, 900, 37.5, (24, 24)),
        (256, 256, 32.0, (8, 8)),
    ],
)
def test_proposals_for_the_release(width, height, compression, stage_c):
    assert sizes.known_cells(1024, 1024) == (24, 60)
    assert sizes.proposed_compression(height, width) == compression
    assert sizes.stage_c_size(height, width, compression) == stage_c


def test_other_models_know_their_own_size():
    assert sizes.known_cells(256, 256) == (6, 6)
    assert sizes.known_cells(96, 128) == (3, 3)
    assert sizes.proposed_compression(384, 512, (6, 6)) == 85.34


@given(height=PIXELS, width=PIXELS)
def test_no_compression_is_the_published_one(height, width):
    assert sizes.stage_c_size(height, width, 0) == sizes.stage_c_size(height, width, 42.67)


def test_compressions_that_cannot_be_are_refused():
    for compression in (3.9, -42.67, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"The compression is .*, expected 0 .* or at least 4 pixels per cell"):
            sizes.stage_c_size(1024, 1024, compression)


@given(
    ratio=st.floats(0.1, 10),
    area=st.floats(64 * 64, 16384**2),
    multiple=st.sampled_from([8, 16, 64]),
)
def test_proposed_sizes_are_near_what_was_asked_for(ratio, area, multiple):
    height, width = sizes.proposed_size(ratio, area, multiple)
    assert height % multiple == width % multiple == 0 and height > 0 and width > 0
    for side, wanted in ((height, (area / ratio) ** 0.5), (width, (area * ratio) ** 0.5)):
        assert abs(side - wanted) <= multiple / 2 + 1e-6 or side == multiple


def test_proposed_sizes_of_nothing_are_refused():
    assert sizes.proposed_size(16 / 9, 2560 * 1440) == (1440, 2560)
    for ratio, area, multiple in ((0, 1024, 8), (1, 0, 8), (1, 1024, 0), (float("nan"), 1024, 8)):
        with pytest.raises(ValueError, match="expected numbers above 0"):
            sizes.proposed_size(ratio, area, multiple)
