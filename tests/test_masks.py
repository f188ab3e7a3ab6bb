"""Masks of pictures: grown, shrunk, softened, brought to a picture, and the mask of a border to paint."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from stable_cascade_nodes.cascade_ops.masks import feathered, padded_for_outpainting, picture_mask, resized_mask


def dot(size=33):
    """One masked pixel in the middle."""
    mask = torch.zeros(1, size, size)
    mask[0, size // 2, size // 2] = 1
    return mask


def box(inner=10, size=30):
    mask = torch.zeros(1, size, size)
    start = (size - inner) // 2
    mask[0, start : start + inner, start : start + inner] = 1
    return mask


def blobs(seed, height, width):
    """A mask of random spots."""
    numbers = torch.rand(1, 1, -(-height // 5), -(-width // 5), generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(numbers, size=(height, width)) > 0.7)[0].float()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.integers(-12, 12), st.integers(0, 12))
def test_it_is_the_ramp_over_the_exact_distance(seed, height, width, grow, feather):
    """Against SciPy's exact Euclidean distance to the outline, which lies half a pixel from the masked centres."""
    mask = blobs(seed, height, width)
    there = mask[0].numpy() > 0
    outside = distance_transform_edt(~there) - 0.5 if there.any() else np.full(there.shape, np.inf)
    inside = distance_transform_edt(there) - 0.5 if not there.all() else np.full(there.shape, np.inf)
    beyond = np.where(there, -inside, outside)
    wanted = np.clip(1 - (beyond - grow) / feather, 0, 1) if feather else beyond <= grow
    np.testing.assert_allclose(feathered(mask, grow, feather)[0].numpy(), wanted.astype(np.float32), atol=1e-5)


def test_growing_makes_a_disc_and_shrinking_takes_it_back():
    grown = feathered(dot(), 5)[0]
    assert grown[16, 11:22].tolist() == [1.0] * 11 and grown[16, 10] == 0
    assert grown[12, 12] == 0 and grown[13, 13] == 1  # 5.7 and 4.2 pixels away
    assert torch.equal(feathered(grown[None], -5)[0], dot()[0])
    assert feathered(box(10), -5).sum() == 0
    assert feathered(box(10), -2).sum() == 36


def test_the_ramp_lies_outside_and_is_as_wide_as_asked():
    row = feathered(box(10), 0, 4)[0, 15]
    assert row[10:20].tolist() == [1.0] * 10
    assert row[20:25].tolist() == row.flip(0)[20:25].tolist() == [0.875, 0.625, 0.375, 0.125, 0.0]
    inwards = feathered(box(10), -4, 4)[0, 15]
    assert inwards[:10].sum() == 0 and inwards[10:15].tolist() == [0.125, 0.375, 0.625, 0.875, 1.0]


def test_whole_and_empty_masks_stay_so_at_every_setting():
    for grow, feather in ((0, 0), (7, 0), (-7, 0), (0, 9), (-20, 9), (20, 9)):
        for value in (0.0, 1.0):
            mask = torch.full((2, 11, 17), value)
            assert torch.equal(feathered(mask, grow, feather), mask)
            assert torch.equal(resized_mask(mask[:, None], 23, 5), torch.full((2, 1, 23, 5), value))


def test_a_part_does_not_shrink_at_the_border_of_the_picture():
    mask = torch.zeros(1, 20, 20)
    mask[:, :, :10] = 1
    shrunk = feathered(mask, -3)
    assert shrunk[:, :, :7].all() and not shrunk[:, :, 7:].any()


def test_soft_masks_are_kept_alone_and_cut_at_a_half_else():
    soft = torch.linspace(0, 1, 12).expand(1, 12, 12)
    assert torch.equal(feathered(soft), soft)
    assert torch.equal(feathered(soft, 1), feathered((soft >= 0.5).float(), 1))
    before = soft.clone()
    feathered(soft, 3, 3)
    assert torch.equal(soft, before)


def test_each_mask_of_a_batch_is_by_itself():
    pair = torch.cat([dot(), torch.zeros(1, 33, 33)])
    made = feathered(pair, 2, 3)
    assert torch.equal(made[:1], feathered(dot(), 2, 3)) and made[1].sum() == 0


def test_a_mask_is_brought_to_the_picture_or_refused():
    assert torch.equal(picture_mask(dot()[0], 3, 33, 33), dot()[:, None])
    larger = torch.zeros(2, 40, 60)
    larger[:, :, 30:] = 1
    fitted = picture_mask(larger, 2, 20, 30)
    assert fitted.shape == (2, 1, 20, 30) and fitted[..., :15].max() == 0 and fitted[..., 15:].min() == 1
    with pytest.raises(ValueError, match=r"There are 1 masks of 64 x 64 for 1 pictures of 30 x 20, expected 1 or 1"):
        picture_mask(torch.zeros(1, 64, 64), 1, 20, 30)
    with pytest.raises(ValueError, match=r"There are 2 masks .* for 3 pictures .* expected 1 or 3"):
        picture_mask(torch.zeros(2, 20, 30), 3, 20, 30)


def test_a_border_goes_on_with_the_edge_and_is_masked():
    image = torch.rand(2, 10, 12, 3, generator=torch.Generator().manual_seed(0))
    padded, mask = padded_for_outpainting(image, 3, 0, 5, 2)
    assert padded.shape == (2, 12, 20, 3) and mask.shape == (1, 12, 20)
    assert torch.equal(padded[:, :10, 3:15], image)
    assert torch.equal(padded[:, :10, :3], image[:, :, :1].expand(-1, -1, 3, -1))
    assert torch.equal(padded[:, 10:, 3:15], image[:, -1:].expand(-1, 2, -1, -1))
    assert torch.equal(padded[:, 11, 19], image[:, 9, 11])
    assert mask[0, :10, 3:15].max() == 0
    assert mask.sum() == 12 * 20 - 10 * 12


def test_the_borders_feather_reaches_into_the_old_picture_from_the_padded_sides():
    _, mask = padded_for_outpainting(torch.zeros(1, 20, 20, 3), 6, 0, 0, 0, 4)
    for row in mask[0]:
        assert row[:11].tolist() == [1.0] * 6 + [0.875, 0.625, 0.375, 0.125, 0.0]
        assert row[11:].max() == 0


def test_a_border_of_nothing_is_refused():
    for sides in ((0, 0, 0, 0), (8, -8, 0, 0)):
        with pytest.raises(ValueError, match=rf"left {sides[0]}, top {sides[1]}, right 0, bottom 0, expected"):
            padded_for_outpainting(torch.zeros(1, 8, 8, 3), *sides)
