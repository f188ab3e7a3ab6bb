"""Faces on a wire: what is accepted from other packs, what becomes of them, and what is shown."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops.control import Faces, as_faces, identity_control, map_picture, with_boxes
from stable_cascade_nodes.cascade_ops.control.show_faces import colours
from stable_cascade_nodes.cascade_ops.control_inputs import identity_input

BOXES = [[10.0, 20.0, 30.0, 60.0], [50.0, 0.0, 90.0, 40.0]]
VECTORS = [[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]


def plain(**changes):
    return {"boxes": BOXES, "embeddings": VECTORS, "width": 100, "height": 80} | changes


def faces(boxes=BOXES, embeddings=VECTORS, width=100, height=80):
    return Faces(torch.tensor(boxes).reshape(-1, 4), torch.tensor(embeddings).reshape(-1, 3), width, height)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_other_packs_may_write_plain_values(form):
    entry = plain(boxes=form(BOXES), embeddings=form(VECTORS), width=np.int64(100))
    (found,) = as_faces([entry])
    assert found.boxes.tolist() == BOXES and found.embeddings.tolist() == VECTORS
    assert (found.boxes.dtype, found.embeddings.dtype) == (torch.float32, torch.float32)
    assert (found.width, found.height) == (100, 80)


def test_our_own_pass_as_they_are_and_pictures_may_have_no_face():
    own = faces()
    nobody = as_faces([own, plain(boxes=[], embeddings=[])])
    assert nobody[0] is own and nobody[1].boxes.shape == (0, 4) and len(nobody[1].embeddings) == 0
    assert as_faces((plain(boxes=np.zeros((0, 4)), embeddings=np.zeros((0, 512))),))[0].embeddings.shape == (0, 512)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (faces(), r"The faces input holds Faces, expected a list with one entry per picture"),
        ("faces.jsonl", r"The faces input holds str, expected a list"),
        ([], r"The faces input is an empty list"),
        ([plain(), 7], r"faces of picture 2 are int, expected boxes, embeddings, width and height"),
        ([{"boxes": [], "width": 8}], r"faces of picture 1 lack embeddings, height"),
        ([plain(boxes="left")], r"faces of picture 1 cannot be read"),
        ([plain(boxes=[[1.0, 2.0], [1.0]])], r"faces of picture 1 cannot be read"),
        ([plain(width="wide")], r"faces of picture 1 cannot be read"),
        ([plain(embeddings=VECTORS[:1])], r"boxes of shape \[2, 4\] and embeddings of shape \[1, 3\]"),
        ([plain(boxes=[[1.0, 2.0, 3.0]] * 2)], r"boxes of shape \[2, 3\]"),
        ([plain(height=0)], r"picture of 100 x 0, expected at least 1 x 1"),
        ([plain(embeddings=[[float("nan")] * 3] * 2)], r"picture 1 have numbers that are not finite"),
        (
            [plain(boxes=[[50.0, 20.0, 30.0, 60.0]] * 2)],
            r"the box \[50.0, 20.0, 30.0, 60.0\], expected left, top, right",
        ),
        ([plain(), plain(embeddings=[[1.0] * 5] * 2)], r"embeddings have 3 and 5 numbers, expected the same"),
    ],
)
def test_what_says_something_else_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        as_faces(value)


# The control ---------------------------------------------------------------------------------------------------


def test_the_control_has_the_width_of_the_embeddings_and_the_size_of_the_picture():
    control, shown = identity_input([faces(), faces(width=50, height=40)], 1024, 768)
    assert control.kind == "identity" and control.size == (768, 1024)
    assert control.samples.shape == (2, 3, 18, 24) and shown.shape == (2, 18 * 32, 24 * 32, 3)
    expected = identity_control([faces().cropped(1024, 768)], 18 * 32, 24 * 32, 3)
    assert torch.equal(control.samples[:1], expected) and not torch.equal(control.samples[:1], control.samples[1:])
    assert torch.allclose(control.samples[0, :, 8, 4], torch.tensor([0.6, 0.0, 0.8]))


@pytest.mark.parametrize(
    ("asked", "made"),
    [((0, 0), (100, 80)), ((512, 0), (512, 410)), ((0, 400), (500, 400)), ((640, 640), (640, 640))],
)
def test_a_side_of_0_keeps_the_shape(asked, made):
    control, _ = identity_input([faces()], *asked)
    assert control.size == made[::-1]


@given(st.integers(64, 2000), st.integers(64, 2000), st.integers(64, 2000), st.integers(64, 2000))
def test_a_face_in_the_middle_stays_there_in_every_shape(width, height, made_width, made_height):
    box = [0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height]
    control, _ = identity_input([faces([box], VECTORS[:1], width, height)], made_width, made_height)
    painted = control.samples[0].any(dim=0)
    rows, columns = painted.shape
    assert painted[rows // 2, columns // 2] or painted[(rows - 1) // 2, (columns - 1) // 2]
    down, across = painted.any(dim=1).nonzero(), painted.any(dim=0).nonzero()
    assert abs(down.min() + down.max() - (rows - 1)) <= 1 and abs(across.min() + across.max() - (columns - 1)) <= 1


@pytest.mark.parametrize(
    ("given_faces", "size", "words"),
    [
        ([faces([], [])], (0, 0), r"There is no face in the picture, expected at least one"),
        ([faces([], [])] * 2, (64, 64), r"There is no face in any of the 2 pictures"),
        ([faces(), faces(width=90)], (0, 0), r"pictures of 90 x 80 and 100 x 80, expected one size"),
        ([faces(), faces(width=90)], (64, 0), r"pictures of 90 x 80 and 100 x 80, expected one size"),
        (
            [faces([[0.0, 0.0, 10.0, 10.0]], VECTORS[:1], 1000, 80)],
            (80, 80),
            r"No face is inside of the middle of the picture in the shape of 80 x 80: .*shape \(1000 x 80\)",
        ),
    ],
)
def test_faces_that_make_no_control_are_refused(given_faces, size, words):
    with pytest.raises(ValueError, match=words):
        identity_input(given_faces, *size)


# What is shown -------------------------------------------------------------------------------------------------


def test_the_map_shows_who_is_where():
    maps = torch.zeros(1, 3, 2, 3)
    maps[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    maps[0, :, 1, 2] = torch.tensor([0.0, 1.0, 0.0])
    shown = map_picture(maps, 4)[0]
    assert shown.shape == (8, 12, 3) and shown.min() >= 0 and shown.max() <= 1
    assert (shown[:4, :4] == shown[0, 0]).all() and (shown[4:, 8:] == shown[7, 11]).all()
    assert shown[0, 0].max() > 0.9 and (shown[0, 0] - shown[7, 11]).abs().max() > 0.1
    assert shown[:4, 4:].max() == 0 and shown[4:, :8].max() == 0


def test_near_embeddings_look_alike_and_others_do_not():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 512, generator=generator)
    near = one + 0.1 * torch.randn(512, generator=generator)
    seen = colours(torch.stack([one, 7 * one, near, other]))
    assert torch.allclose(seen[0], seen[1], atol=1e-5)
    assert (seen[0] - seen[2]).abs().max() < 0.15 < 0.3 < (seen[0] - seen[3]).abs().max()


def test_frames_stand_around_the_faces_and_nothing_else_changes():
    pictures = torch.full((1, 160, 200, 3), 0.5)
    shown = with_boxes(pictures, [faces()])  # twice the size of the picture that the faces are of
    changed = (shown[0] != 0.5).any(dim=-1)
    assert (pictures == 0.5).all()
    for left, top, right, bottom in (2 * torch.tensor(BOXES)).int().tolist():
        frame = changed[top:bottom, left:right]
        assert frame[0].all() and frame[-1].all() and frame[:, 0].all() and frame[:, -1].all()
        assert not frame[4:-4, 4:-4].any()
        changed[top:bottom, left:right] = False
    assert not changed.any()


def test_a_face_outside_of_the_picture_does_no_harm():
    shown = with_boxes(torch.zeros(1, 50, 50, 3), [faces([[-80.0, -90.0, -10.0, -20.0]], VECTORS[:1])])
    assert shown.shape == (1, 50, 50, 3) and torch.isfinite(shown).all()
