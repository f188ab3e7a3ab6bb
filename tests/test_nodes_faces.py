"""The nodes for faces, called by hand: files of the input folder, tiny detectors, and an identity ControlNet."""

import json
import sys

import pytest
import torch
from attachment_kit import noise, samples, saved_controlnet
from faces_kit import detector, ramp, recogniser
from nodes_kit import load, run, sample_c

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops.control import Faces, write_faces
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.nodes import faces as module
from stable_cascade_nodes.tiny.objects import WIDTH

BOX, VECTOR = [10.0, 8.0, 60.0, 50.0], [1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0]


@pytest.fixture
def inputs(fuller_host, tmp_path, monkeypatch):
    """The input folder of the host."""
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setattr(fuller_host, "input_directory", lambda: str(folder), raising=False)
    return folder


@pytest.fixture
def onnx_files(inputs, fuller_host, tmp_path, monkeypatch):
    """The folder of the user's ONNX files, empty."""
    monkeypatch.setattr(fuller_host, "root", tmp_path / "models")
    return tmp_path / "models" / "insightface"


def one_face(width=100, height=60):
    return Faces(torch.tensor([BOX]), torch.tensor([VECTOR]), width, height)


def lit(*cells, side=64):
    """A picture with blue light in some (column, row) of the detector's middle grid."""
    picture = ramp(side, side)
    for column, row in cells:
        picture[2, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1
    return picture.permute(1, 2, 0)


# Loading -------------------------------------------------------------------------------------------------------


def test_the_example_needs_no_file(inputs):
    loaded = run("CascadeLoadFaces", file=module.EXAMPLE, picture="two")
    (faces,) = loaded["result"][0]
    assert loaded["ui"]["text"] == ["2 faces in 1 picture of 256 x 256"]
    assert faces.boxes.shape == (2, 4) and faces.embeddings.shape == (2, WIDTH)
    declared = NODE_CLASS_MAPPINGS["CascadeLoadFaces"].INPUT_TYPES()["required"]
    assert declared["file"][0] == [module.EXAMPLE] and declared["file"][1]["default"] == module.EXAMPLE
    assert len(run("CascadeLoadFaces", file=module.EXAMPLE, picture="circle.png")["result"][0]) == 1


def test_files_of_the_input_folder_are_read(inputs):
    write_faces(inputs / "a.safetensors", {"anna.jpg": one_face(), "bert.jpg": one_face(90)})
    entry = {"name": "carl", "width": 8, "height": 8, "faces": []}
    (inputs / "b.jsonl").write_text(json.dumps(entry))
    (inputs / "c.txt").write_text("no")
    (inputs / "d.jsonl").mkdir()
    node = NODE_CLASS_MAPPINGS["CascadeLoadFaces"]
    assert node.INPUT_TYPES()["required"]["file"][0] == [module.EXAMPLE, "a.safetensors", "b.jsonl"]
    (anna,) = run("CascadeLoadFaces", file="a.safetensors", picture=" anna ")["result"][0]
    assert anna.boxes.tolist() == [BOX] and anna.width == 100
    everyone = run("CascadeLoadFaces", file="a.safetensors", picture="")
    assert everyone["ui"]["text"] == ["2 faces in 2 pictures of 100 x 60 and 90 x 60"]
    assert run("CascadeLoadFaces", file="b.jsonl", picture="carl")["ui"]["text"] == ["0 faces in 1 picture of 8 x 8"]
    with pytest.raises(ValueError, match="no entry for the picture 'dora'"):
        run("CascadeLoadFaces", file="a.safetensors", picture="dora")
    first = node.IS_CHANGED("b.jsonl", picture="carl")
    (inputs / "b.jsonl").write_text(json.dumps(entry) + "\n")
    assert node.IS_CHANGED("b.jsonl", picture="carl") != first


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/secret.jsonl", "none.jsonl", "c.txt"])
def test_only_the_lists_own_files_are_opened(inputs, name):
    (inputs / "c.txt").write_text("no")
    (inputs.parent / "secret.jsonl").write_text('{"name": "a", "width": 8, "height": 8, "faces": []}')
    with pytest.raises(ValueError, match=r"There is no file .* with faces in"):
        run("CascadeLoadFaces", file=name, picture="")


# Finding -------------------------------------------------------------------------------------------------------


def test_faces_are_found_and_framed(onnx_files, fuller_host):
    detector(onnx_files / "models/buffalo_l/det_10g.onnx")
    recogniser(onnx_files / "models/buffalo_l/w600k_r50.onnx")
    image = torch.stack([lit((1, 1)), lit()])
    found = run("CascadeDetectFaces", image=image, detector="auto", recogniser="auto", threshold=0.5)
    faces, shown = found["result"]
    assert [len(each.boxes) for each in faces] == [1, 0]
    assert found["ui"]["text"] == ["1 face in 2 pictures of 64 x 64, by det_10g.onnx and w600k_r50.onnx"]
    assert fuller_host.seen == [(1, 2, None), (2, 2, None)]
    left, top, right, bottom = map(round, faces[0].boxes[0].tolist())
    changed = (shown != image).any(dim=-1)
    assert changed[0, top, left:right].all() and changed[0, top:bottom, left].all() and not changed[1].any()
    assert not changed[0, :top].any() and not changed[0, bottom:].any()
    control = run("CascadeFaceIdentityControl", faces=faces[:1], width=0, height=0)["result"][0]
    assert control.samples.shape == (1, 12, 2, 2)


def test_auto_looks_into_the_files(onnx_files):
    detector(onnx_files / "a.onnx")
    recogniser(onnx_files / "b.onnx", side=96)  # such as one that guesses the age
    recogniser(onnx_files / "c.onnx")
    (onnx_files / "0 broken.onnx").write_bytes(b"no")
    inputs = {"image": lit((1, 1))[None], "detector": "auto", "recogniser": "auto", "threshold": 0.5}
    said = run("CascadeDetectFaces", **inputs)["ui"]["text"][0]
    assert said.endswith("by a.onnx and c.onnx")
    detector(onnx_files / "z/scrfd_10g_bnkps.onnx")
    recogniser(onnx_files / "z/glintr100.onnx")
    said = run("CascadeDetectFaces", **inputs)["ui"]["text"][0]
    assert said.endswith("by scrfd_10g_bnkps.onnx and glintr100.onnx")
    declared = NODE_CLASS_MAPPINGS["CascadeDetectFaces"].INPUT_TYPES()["required"]
    names = ["auto", "0 broken.onnx", "a.onnx", "b.onnx", "c.onnx", "z/glintr100.onnx", "z/scrfd_10g_bnkps.onnx"]
    assert declared["detector"][0] == declared["recogniser"][0] == names
    with pytest.raises(ValueError, match=r"c\.onnx reads .*expected a face detector"):
        run("CascadeDetectFaces", **inputs | {"detector": "c.onnx"})
    with pytest.raises(ValueError, match=r"insightface: .*none\.onnx"):
        run("CascadeDetectFaces", **inputs | {"recogniser": "none.onnx"})


def test_a_file_that_changes_is_looked_at_again(onnx_files):
    node = NODE_CLASS_MAPPINGS["CascadeDetectFaces"]
    detector(onnx_files / "a.onnx")
    recogniser(onnx_files / "b.onnx")
    for choice in ({"detector": "auto", "recogniser": "b.onnx"}, {"detector": "a.onnx", "recogniser": "b.onnx"}):
        before = node.IS_CHANGED(**choice, threshold=0.5)
        assert node.IS_CHANGED(**choice, threshold=0.5) == before
        detector(onnx_files / "a.onnx", points=not before)
        assert node.IS_CHANGED(**choice, threshold=0.5) != before


def test_what_is_missing_is_named_with_the_way_to_get_it(onnx_files, monkeypatch):
    inputs = {"image": lit()[None], "detector": "auto", "recogniser": "auto", "threshold": 0.5}
    with pytest.raises(ValueError, match=r"No face detector was found in .*insightface, expected det_10g\.onnx"):
        run("CascadeDetectFaces", **inputs)
    detector(onnx_files / "a.onnx")
    with pytest.raises(ValueError, match=r"No face recogniser was found in .*expected w600k_r50\.onnx"):
        run("CascadeDetectFaces", **inputs)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install onnxruntime, or pip install 'stable-cascade-nodes\[faces\]'"):
        run("CascadeDetectFaces", **inputs)


def test_a_run_can_be_stopped_between_pictures(onnx_files, fuller_host):
    detector(onnx_files / "d.onnx")
    recogniser(onnx_files / "r.onnx")
    fuller_host.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(
            "CascadeDetectFaces",
            image=torch.stack([lit()] * 3),
            detector="d.onnx",
            recogniser="r.onnx",
            threshold=0.5,
        )
    assert fuller_host.seen == [(1, 3, None)]


# The control ---------------------------------------------------------------------------------------------------


@pytest.fixture
def identity(tmp_path):
    return load_stage(saved_controlnet(tmp_path / "identity.safetensors", "identity"), "controlnet")


def applied(identity, faces, width=0, height=0, **changes):
    made = run("CascadeFaceIdentityControl", faces=faces, width=width, height=height)
    inputs = {"stage_c": load("CascadeLoadStageC"), "controlnet": identity, "control": made["result"][0]}
    return made, run("CascadeApplyControlNet", **inputs | {"strength": 1.0, "start": 1.0, "end": 0.0} | changes)


def test_faces_steer_stage_c(inputs, fuller_host, identity):
    made, handle = applied(identity, (one_face(),))
    shown = made["result"][1]
    remark = "1 face in 1 picture of 100 x 60, 8 numbers each, in 4 of 6 cells"
    assert made["ui"]["text"] == [f"control for identity of a picture of 100 x 60: {remark}"]
    assert shown.shape == (1, 64, 96, 3) and shown.max() > 0.9
    assert (shown[0, 10, 80] == 0).all() and (shown[0, 5, 5] > 0).any()
    plain, _ = sample_c(fuller_host)
    steered, _ = sample_c(fuller_host, stage_c=handle["result"][0])
    assert (samples(steered) - samples(plain)).abs().max() > 1e-3
    off, _ = sample_c(fuller_host, stage_c=applied(identity, (one_face(),), strength=0.0)[1]["result"][0])
    assert torch.equal(samples(off), samples(plain))
    plainly = [{"boxes": [BOX], "embeddings": [VECTOR], "width": 100, "height": 60}]
    again, _ = sample_c(fuller_host, stage_c=applied(identity, plainly)[1]["result"][0])
    assert torch.equal(samples(again), samples(steered))


def test_embeddings_of_another_recogniser_are_refused(inputs, identity):
    other = Faces(torch.tensor([BOX]), noise(1, 12), 100, 60)
    with pytest.raises(ValueError, match=r"control is for face identity with 12 channels, and .*expected 8 channels"):
        applied(identity, (other,))


def test_the_shape_of_the_picture_counts(inputs, fuller_host, identity):
    tall = (one_face(60, 100),)
    with pytest.raises(ValueError, match="60 x 100 and the picture to make is 100 x 60"):
        sample_c(fuller_host, stage_c=applied(identity, tall)[1]["result"][0])
    sample_c(fuller_host, stage_c=applied(identity, tall, 100, 60)[1]["result"][0])


def test_a_batch_of_faces_steers_each_picture_by_its_own(inputs, identity):
    control = applied(identity, (one_face(), one_face(100, 60)))[0]["result"][0]
    assert control.samples.shape == (2, 8, 2, 3)
