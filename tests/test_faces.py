"""Finding faces: similarities, the detector's answers, and the chain from a picture to embeddings."""

import math
import sys

import numpy as np
import pytest
import torch
from faces_kit import DISTANCES, POINTS, detector, ramp, recogniser, saved, umeyama
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from stable_cascade_nodes.cascade_ops.faces import (
    FaceDetector,
    FaceRecogniser,
    Network,
    aligned,
    find_faces,
    similarity,
)
from stable_cascade_nodes.cascade_ops.faces.alignment import TEMPLATE, from_boxes
from stable_cascade_nodes.cascade_ops.faces.detector import kept_boxes, letterboxed

COORDINATES = st.floats(-500, 500, width=32)
POINT_SETS = st.lists(st.tuples(COORDINATES, COORDINATES), min_size=5, max_size=5)


def moved(points, angle, scale, shift):
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.concatenate([turn, np.reshape(shift, (2, 1))], axis=1), np.asarray(points) @ turn.T + shift


def spread(points):
    return np.asarray(points, np.float64).var(axis=0).sum()


# Alignment -----------------------------------------------------------------------------------------------------


@given(POINT_SETS, st.floats(-3, 3), st.floats(0.05, 20), st.tuples(COORDINATES, COORDINATES))
def test_a_similarity_is_recovered(points, angle, scale, shift):
    assume(spread(points) > 1)
    matrix, targets = moved(points, angle, scale, shift)
    found = similarity(torch.tensor(points), torch.tensor(targets))
    assert torch.allclose(found[0], torch.tensor(matrix), atol=1e-4 * (1 + scale), rtol=1e-4)


@given(POINT_SETS, POINT_SETS)
def test_points_that_do_not_fit_get_umeyamas_transform(points, targets):
    assume(spread(points) > 1 and spread(targets) > 1)
    expected = umeyama(points, targets)
    found = similarity(torch.tensor(points), torch.tensor(targets))[0].numpy()
    errors = [np.square(np.asarray(points) @ m[:, :2].T + m[:, 2] - targets).sum() for m in (found, expected)]
    assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-3
    assert np.linalg.det(found[:, :2]) >= 0  # Nothing is mirrored.


def test_faces_are_transformed_each_by_its_own_points():
    pairs = [moved(TEMPLATE, angle, scale, (angle, scale)) for angle, scale in ((0.3, 2.0), (-1.0, 0.5))]
    found = similarity(torch.tensor(np.stack([points for _, points in pairs])), TEMPLATE)
    for matrix, (_, points) in zip(found, pairs, strict=True):
        assert np.allclose(points @ matrix[:, :2].numpy().T + matrix[:, 2].numpy(), TEMPLATE, atol=1e-4)


def test_points_in_one_place_are_refused():
    with pytest.raises(ValueError, match="five points of a face are all in one place"):
        similarity(torch.ones(2, 5, 2), TEMPLATE)


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3), st.floats(0.5, 1.5), st.floats(280, 320), st.floats(280, 320))
def test_a_face_is_looked_up_where_it_is(angle, scale, x, y):
    """The ramp's pixels say from where they were taken."""
    turn = moved(TEMPLATE, angle, scale, (0, 0))[0][:, :2]
    matrix = np.concatenate([turn, (np.array([56, 56]) - turn @ [x, y])[:, None]], axis=1)  # (x, y) to the middle
    face = aligned(ramp(600, 600), torch.tensor(matrix)[None])[0]
    assert face.shape == (3, 112, 112)
    for column, row in ((56, 56), (30, 40), (70, 90)):
        source = np.linalg.solve(turn, np.array([column, row]) - matrix[:, 2])
        assert np.allclose(600 * face[:2, row, column].numpy(), source, atol=0.05)


def test_outside_of_the_picture_is_black_and_other_sides_scale():
    matrix = torch.tensor([[[1.0, 0.0, 50.0], [0.0, 1.0, 0.0]]])
    face = aligned(torch.ones(3, 200, 200), matrix)[0]
    assert face[:, :, :49].max() == 0 and face[:, :, 51:].min() > 0.999
    half = aligned(torch.ones(3, 200, 200), matrix, 56)[0]
    assert half.shape == (3, 56, 56) and half[:, :, :24].max() == 0 and half[:, :, 26:].min() > 0.999


def test_a_box_alone_gives_an_upright_face():
    matrix = from_boxes(torch.tensor([[100.0, 50.0, 178.0, 154.0]]))[0]
    assert matrix[:, :2].tolist() == [[1, 0], [0, 1]]
    eyes_and_mouth = torch.tensor([[139.0, 50 + 0.39 * 104], [139.0, 50 + 0.78 * 104]], dtype=torch.float64)
    placed = eyes_and_mouth @ matrix[:, :2].T + matrix[:, 2]
    wanted = torch.stack([TEMPLATE[:2].mean(0), TEMPLATE[3:].mean(0)])
    assert (placed - wanted).abs().max() < 1.5


# Detection -----------------------------------------------------------------------------------------------------


def picture_with_light(height=96, width=128, column=1, row=2):
    """A ramp of twice the detector's size with blue light in one cell of its middle grid."""
    picture = ramp(height, width)
    picture[2, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 1
    return picture


BOX = [2 * 16 * value for value in (1 - DISTANCES[0], 2 - DISTANCES[1], 1 + DISTANCES[2])]


@pytest.mark.parametrize("form", [{}, {"batched": True}, {"reverse": True}, {"points": False}])
def test_a_face_is_where_the_detector_says(tmp_path, form):
    found = FaceDetector(Network(detector(tmp_path / "d.onnx", **form))).find(picture_with_light())
    assert found.scores.tolist() == pytest.approx([127.5 / 128], abs=0.06)  # shrinking blurs the border of the light
    # The anchor is the cell's upper left corner; the lower side ends with the picture.
    assert found.boxes.tolist() == [[*BOX, 96.0]]
    if form.get("points", True):
        assert torch.allclose(found.points[0], 32 * (torch.tensor(POINTS) + torch.tensor([1.0, 2.0])))
    else:
        assert found.points is None


def test_the_threshold_decides(tmp_path):
    finder = FaceDetector(Network(detector(tmp_path / "d.onnx")))
    picture = ramp(64, 64)
    picture[2, 32:48, 16:32] = 0.8
    score = (0.8 * 255 - 127.5) / 128
    assert len(finder.find(picture, score - 0.01).boxes) == 1
    assert len(finder.find(picture, score + 0.01).boxes) == 0
    # Lower still, the other grids speak too.
    assert len(finder.find(picture, 0.2).boxes) > 1


def test_one_face_is_found_once_and_two_are_two(tmp_path):
    finder = FaceDetector(Network(detector(tmp_path / "d.onnx")))
    near, far = picture_with_light(column=0), picture_with_light(column=0)
    near[2, 64:96, 32:64] = 0.9
    far[2, 64:96, 96:128] = 0.9
    assert len(finder.find(near).boxes) == 1
    scores = finder.find(far).scores
    assert len(scores) == 2 and scores[0] > scores[1]


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 12)] * 2, st.floats(0, 1)), max_size=12))
def test_boxes_that_stay_do_not_share_and_those_that_go_do(entries):
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h, _ in entries], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([entry[-1] for entry in entries])
    kept = kept_boxes(boxes, scores, 0.4).tolist()

    def share(a, b):
        sides = [min(boxes[a, 2 + i], boxes[b, 2 + i]) - max(boxes[a, i], boxes[b, i]) for i in (0, 1)]
        both = float(max(sides[0], 0) * max(sides[1], 0))
        areas = [float((boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])) for i in (a, b)]
        return both / (sum(areas) - both)

    assert [float(scores[i]) for i in kept] == sorted((float(scores[i]) for i in kept), reverse=True)
    assert all(share(a, b) <= 0.4 + 1e-6 for a in kept for b in kept if a != b)
    for gone in set(range(len(entries))) - set(kept):
        assert any(share(gone, better) > 0.4 - 1e-6 and scores[better] >= scores[gone] for better in kept)


@pytest.mark.parametrize(("height", "width"), [(96, 128), (128, 96), (1, 500), (64, 64), (20, 10)])
def test_a_picture_fits_the_upper_left_of_the_square(height, width):
    shown, scale = letterboxed(torch.ones(3, height, width), 64, 64)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    assert shown.shape == (1, 3, 64, 64) and max(rows, columns) == 64
    assert shown[..., :rows, :columns].min() > 0.999
    assert shown.sum() == pytest.approx(3 * rows * columns, rel=1e-3)


# The chain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [True, False])
def test_a_picture_becomes_embeddings(tmp_path, points):
    """The recogniser sees the mean place of each quarter of the face, which the ramp says."""
    finder = FaceDetector(Network(detector(tmp_path / "d.onnx", points=points)))
    reader = FaceRecogniser(Network(recogniser(tmp_path / "r.onnx")))
    done = []
    shown = [picture_with_light(256, 256, column=1, row=1), ramp(256, 256)]
    shown[0][2] = 0
    shown[0][2, 128:192, 128:192] = 1  # one cell of the middle grid, at a quarter of the size: (2, 2)
    found = find_faces(torch.stack(shown), finder, reader, callback=done.append)
    assert done == [1, 2]
    assert [len(faces.boxes) for faces in found] == [1, 0] and [faces.width for faces in found] == [256, 256]
    if points:
        matrix = umeyama([(64 * (x + 2), 64 * (y + 2)) for x, y in POINTS], TEMPLATE.numpy())
    else:
        left, top, right, bottom = found[0].boxes[0].tolist()
        scale = 104 / (bottom - top)
        matrix = np.array([[scale, 0, 56 - scale * (left + right) / 2], [0, scale, 63 - scale * (top + bottom) / 2]])
    red, green = found[0].embeddings[0].reshape(3, 2, 2)[:2].numpy() * 127.5 / 255 + 0.5
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        middle = np.array([27.5 + 56 * column, 27.5 + 56 * row])
        source = np.linalg.solve(matrix[:, :2], middle - matrix[:, 2])
        assert np.allclose([256 * red[row, column], 256 * green[row, column]], source, atol=0.6)


# What is refused -----------------------------------------------------------------------------------------------


def test_without_onnxruntime_the_command_is_named(tmp_path, monkeypatch):
    path = recogniser(tmp_path / "r.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs the package onnxruntime.*pip install onnxruntime"):
        Network(path)


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not that")
    with pytest.raises(ValueError, match=r"x\.onnx cannot be opened .*expected an ONNX model"):
        Network(tmp_path / "x.onnx")
    finder, reader = (Network(make(tmp_path / f"{make.__name__}.onnx")) for make in (detector, recogniser))
    with pytest.raises(ValueError, match=r"recogniser\.onnx reads \[1, 3, 112, 112\] .*expected a face detector"):
        FaceDetector(reader)
    with pytest.raises(ValueError, match=r"detector\.onnx reads \[1, 3, 64, 64\] .*expected a face recogniser"):
        FaceRecogniser(finder)
    with pytest.raises(ValueError, match="expected a face recogniser"):
        FaceRecogniser(Network(recogniser(tmp_path / "genderage.onnx", side=96)))


def test_outputs_that_do_not_belong_together_are_refused(tmp_path):
    """A file that hides its sizes is asked, and does not answer as a detector."""
    shapes = {f"out{number}": ["n", "m"] for number in range(6)}
    nodes = [helper.make_node("Reshape", ["picture", "size"], [name]) for name in shapes]
    path = saved(tmp_path / "odd.onnx", nodes, {"picture": [1, 3, 64, 64]}, shapes, {"size": np.array([-1, 4])})
    with pytest.raises(ValueError, match=r"odd\.onnx gave outputs 4, 4, 4, 4, 4, 4 wide, expected as many scores"):
        FaceDetector(Network(path)).find(ramp(64, 64))
    two = detector(tmp_path / "two.onnx", points=False, levels=2)
    with pytest.raises(ValueError, match="expected a face detector"):
        FaceDetector(Network(two))
