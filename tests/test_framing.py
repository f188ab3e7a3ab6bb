"""Which part of a picture becomes a latent, and at which size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops.framing import Frame, frame_of, longest_side

SIDES = st.integers(1, 7000)


@pytest.mark.parametrize(
    ("height", "width", "asked", "expected"),
    [
        (768, 1024, (0, 0), (1024, 768)),
        (4000, 6000, (0, 0), (2560, 1704)),  # (6000, 4000) made smaller, its short side to a multiple of 8
        (2000, 3000, (1500, 0), (1500, 1000)),
        (2000, 3000, (0, 1000), (1500, 1000)),
        (2000, 3000, (3000, 0), (3000, 2000)),  # a size that is asked for is not made smaller
        (100, 100, (1000, 600), (1000, 600)),
    ],
)
def test_the_size_to_make(height, width, asked, expected):
    frame = frame_of(height, width, *asked, longest=2560)
    assert (frame.width, frame.height) == expected


def test_the_most_that_is_made_unasked():
    assert (longest_side("release"), longest_side(""), longest_side("tiny")) == (2560, 2560, 256)
    assert longest_side("release", 64.0) == 3840
    frame = frame_of(6000, 6000)
    assert (frame.width, frame.height) == (6000, 6000)


def test_cropping_takes_the_middle_and_stretching_all():
    assert frame_of(100, 200, 64, 64) == Frame(50, 0, 100, 100, 64, 64)
    assert frame_of(200, 100, 64, 64) == Frame(0, 50, 100, 100, 64, 64)
    assert frame_of(100, 200, 64, 64, "stretch") == Frame(0, 0, 200, 100, 64, 64)
    assert [frame_of(100, 200, 64, 64, fit).cuts for fit in ("crop", "stretch")] == [True, False]
    assert not frame_of(100, 200, 400, 200).cuts


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.integers(0, 4000), st.integers(0, 4000), st.sampled_from(["crop", "stretch"]))
def test_a_frame_lies_inside_and_crops_one_way_to_the_shape_asked_for(height, width, wide, high, fit):
    frame = frame_of(height, width, wide, high, fit, 2560)
    assert frame.left >= 0 and frame.left + frame.columns <= width and frame.columns >= 1
    assert frame.top >= 0 and frame.top + frame.rows <= height and frame.rows >= 1
    assert (frame.width, frame.height) == (wide or frame.width, high or frame.height)
    if fit == "stretch" or not (wide or high or max(height, width) > 2560):
        assert (frame.columns, frame.rows) == (width, height)
    else:
        assert frame.columns == width or frame.rows == height
        # The part has the shape of the result, to half a pixel.
        off = abs(frame.columns * frame.height - frame.rows * frame.width)
        assert off <= 0.5 * max(frame.height, frame.width) + 1e-6 or 1 in (frame.columns, frame.rows)


def test_pictures_are_cut_and_resized_smoothly_or_by_single_pixels():
    checks = (torch.arange(64)[:, None] + torch.arange(96)).remainder(2).float().expand(1, 3, -1, -1)
    frame = frame_of(64, 96, 32, 32)
    assert (frame.picture(checks) - 0.5).abs().max() < 0.2
    assert set(frame.picture(checks, resize="nearest").unique().tolist()) <= {0.0, 1.0}
    assert frame.picture(checks, (16, 16)).shape == (1, 3, 16, 16)
    ramp = torch.linspace(0, 1, 96).expand(1, 3, 64, 96)
    assert frame.picture(ramp)[0, 0, 0, [0, -1]].tolist() == pytest.approx([16.5 / 95, 78.5 / 95], abs=0.01)


def test_a_picture_of_the_size_asked_for_comes_back_to_the_bit():
    image = torch.rand(2, 30, 50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(frame_of(30, 50).image(image), image[..., :3])
    assert torch.equal(frame_of(30, 50, 20, 30).image(image), image[:, :, 15:35, :3])


def test_a_mask_is_cut_with_its_picture():
    mask = torch.zeros(1, 60, 100)
    mask[:, :, 50:] = 1
    cut = frame_of(60, 100, 30, 30).mask(mask, 2, 60, 100)
    assert cut.shape == (1, 1, 30, 30)
    assert cut[..., :15].max() == 0 and cut[..., 15:].min() == 1
    with pytest.raises(ValueError, match="1 masks of 64 x 64 for 2 pictures of 100 x 60"):
        frame_of(60, 100).mask(torch.zeros(1, 64, 64), 2, 60, 100)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="no way to fit called 'pad': choose one of crop, stretch"):
        frame_of(10, 10, fit="pad")
    with pytest.raises(ValueError, match="asked for is -8 x 0"):
        frame_of(10, 10, -8, 0)
