"""Edges: as OpenCV finds them, and what the detector does with sizes, borders and thresholds."""

import pytest
import torch
from golden import read_golden

from stable_cascade_nodes.cascade_ops.control import canny, canny_control


def step_edge(contrast, width=20):
    """A picture whose right half is brighter by `contrast` levels."""
    image = torch.full((1, 3, 12, width), 0.2)
    image[..., width // 2 :] += contrast / 255
    return image


@pytest.fixture(scope="module")
def golden():
    return read_golden("canny")[0]


def test_edges_are_opencvs_at_full_size(golden):
    edges = canny(golden["image"])
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert (edges != golden["edges_full"]).float().mean() <= 0.005


def test_the_references_square_and_back(golden):
    control = canny_control(golden["image"])
    assert control.shape == golden["edges"].shape
    assert ((control - golden["edges"]).abs() > 1e-3).float().mean() <= 0.005
    assert (golden["edges"] != golden["edges_full"]).float().mean() > 0.02  # the two variants do differ
    assert torch.equal(canny_control(golden["image"], side=None), canny(golden["image"]))


def test_a_picture_has_its_edges_whatever_its_batch(golden):
    upside_down = golden["image"].flip(2)
    both = canny(torch.cat([golden["image"], upside_down]))
    assert torch.equal(both[:1], canny(golden["image"]))
    assert torch.equal(both[1:], canny(upside_down))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("contrast", "found"),
    [(24, False), (26, False), (49, False), (51, True)],  # a step is four times its contrast long
)
def test_the_high_threshold_begins_an_edge(contrast, found):
    assert bool(canny(step_edge(contrast)).any()) == found
    assert bool(canny(step_edge(contrast), low=20, high=4 * contrast - 1).any())


def test_an_edge_is_one_pixel_wide_and_reaches_the_border():
    assert canny(step_edge(100)).sum(dim=3).eq(1).all()


def test_a_weak_edge_counts_where_it_goes_on_from_a_strong_one():
    image = step_edge(40)
    assert not canny(image).any()
    image[..., :3, 10:] = 0.2 + 100 / 255
    assert canny(image)[0, 0, 6:].sum() == 6
    assert not canny(image, low=170)[0, 0, 6:].any()


def test_a_channel_alone_makes_an_edge():
    image = torch.full((1, 3, 12, 20), 0.5)
    image[:, 2, :, 10:] = 1.0
    assert canny(image).any()
    assert not canny(image[:, :2]).any()


def test_small_pictures_keep_their_lines():
    small = torch.zeros(1, 3, 48, 48)
    small[..., 12:36, 12:36] = 1
    control = canny_control(small)
    assert control.shape == (1, 1, 48, 48)
    for line in (control[0, 0, 24, 8:16], control[0, 0, 24, 32:40], control[0, 0, 8:16, 24], control[0, 0, 32:40, 24]):
        assert line.max() > 0.1
    assert control[0, 0, 20:28, 20:28].max() == 0


def test_a_batch_of_none_and_what_is_refused():
    with pytest.raises(ValueError, match="thresholds 200 and 100"):
        canny(step_edge(50), low=200, high=100)
    with pytest.raises(ValueError, match="expected \\[batch, channels, height, width\\]"):
        canny(step_edge(50)[0])
