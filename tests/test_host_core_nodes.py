"""LoadImage, LoadImageMask, SaveImage, PreviewImage."""

import json
import os
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade_nodes.host import Host
from stable_cascade_nodes.host.core_nodes import LoadImage, LoadImageMask, PreviewImage, SaveImage
from stable_cascade_nodes.host.folders import DataFolders, inside, split_annotation
from stable_cascade_nodes.host.pictures import NumberedFiles, expand_prefix
from stable_cascade_nodes.nodes import runtime


@pytest.fixture
def host(tmp_path):
    host = Host(DataFolders(tmp_path / "data"))
    host.folders.input.mkdir(parents=True)
    with runtime.using(host.backend):
        yield host


def gradient(mode="RGB", size=(6, 4)):
    width, height = size
    values = np.arange(width * height * len(mode), dtype=np.uint8).reshape(height, width, -1) * 2
    return Image.fromarray(values.squeeze(-1) if len(mode) == 1 else values, mode)


def test_load_gives_the_pixels_and_an_empty_mask(host):
    picture = gradient()
    picture.save(host.folders.input / "a.png")
    image, mask = LoadImage().load_image("a.png")
    assert image.dtype == torch.float32
    assert image.shape == (1, 4, 6, 3)
    assert torch.equal((image[0] * 255).round().byte(), torch.from_numpy(np.array(picture)))
    assert mask.shape == (1, 64, 64)
    assert mask.max() == 0


def test_transparency_becomes_the_mask(host):
    picture = gradient("RGBA")
    picture.save(host.folders.input / "a.png")
    image, mask = LoadImage().load_image("a.png")
    assert image.shape == (1, 4, 6, 3)
    assert torch.allclose(mask[0], 1 - torch.from_numpy(np.asarray(picture)[..., 3] / 255).float(), atol=1e-6)


def test_palette_transparency_becomes_the_mask(host):
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((1, 0), 1)
    picture.save(host.folders.input / "a.png", transparency=0)
    image, mask = LoadImage().load_image("a.png")
    assert mask[0].tolist() == [[1.0, 0.0]]
    assert image[0, 0, 1].tolist() == [1.0, 0.0, 0.0]


def test_exif_rotation_is_applied(host):
    picture = Image.new("RGB", (8, 4), "black")
    picture.paste("white", (0, 0, 4, 4))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    picture.save(host.folders.input / "a.png", exif=exif)
    image, _ = LoadImage().load_image("a.png")
    assert image.shape == (1, 8, 4, 3)
    assert image[0, :4].min() == 1
    assert image[0, 4:].max() == 0
    (mask,) = LoadImageMask().load_image("a.png", "red")
    assert mask.shape == (1, 8, 4)
    assert mask[0, :4].min() == 1


def test_sixteen_bit_grey_keeps_its_range(host):
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(host.folders.input / "a.png")
    image, _ = LoadImage().load_image("a.png")
    assert (image[0, 0, :, 0] * 255).round().tolist() == [0, 128, 255]


def test_an_animation_is_a_batch(host):
    frames = [Image.new("RGB", (5, 3), color) for color in ("red", "blue")]
    frames[0].save(host.folders.input / "a.gif", save_all=True, append_images=frames[1:])
    image, mask = LoadImage().load_image("a.gif")
    assert image.shape == (2, 3, 5, 3)
    assert len(mask) == 2
    assert image[0, 0, 0, 0] > 0.9
    assert image[1, 0, 0, 2] > 0.9


@pytest.mark.parametrize(("channel", "index"), [("red", 0), ("green", 1), ("blue", 2), ("alpha", 3)])
def test_mask_channels(host, channel, index):
    picture = gradient("RGBA")
    picture.save(host.folders.input / "a.png")
    (mask,) = LoadImageMask().load_image("a.png", channel)
    expected = torch.from_numpy(np.asarray(picture)[..., index] / 255).float()
    assert torch.allclose(mask[0], 1 - expected if channel == "alpha" else expected, atol=1e-6)


def test_the_alpha_of_an_opaque_picture_is_an_empty_mask_of_its_size(host):
    gradient().save(host.folders.input / "a.png")
    (mask,) = LoadImageMask().load_image("a.png", "alpha")
    assert mask.shape == (1, 4, 6)
    assert mask.max() == 0


def test_a_damaged_file_is_named(host):
    (host.folders.input / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        LoadImage().load_image("a.png")


def test_the_list_offers_pictures_only_and_other_folders_by_annotation(host):
    gradient().save(host.folders.input / "b.png")
    (host.folders.input / "notes.txt").write_text("x")
    assert LoadImage.INPUT_TYPES()["required"]["image"][0] == ["b.png"]
    host.folders.output.mkdir()
    gradient().save(host.folders.output / "c.png")
    assert LoadImage.VALIDATE_INPUTS("c.png [output]") is True
    assert "Invalid image file" in LoadImage.VALIDATE_INPUTS("c.png")
    assert split_annotation("c.png [output]") == ("c.png", "output")
    assert split_annotation("c.png [other]") == ("c.png [other]", "input")


def test_a_changed_file_is_loaded_again(host):
    path = host.folders.input / "a.png"
    Image.new("RGB", (2, 2), "red").save(path)
    before = LoadImage.IS_CHANGED("a.png")
    assert LoadImage.IS_CHANGED("a.png") == before
    Image.new("RGB", (2, 2), "blue").save(path)
    assert LoadImage.IS_CHANGED("a.png") != before


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "..\\secret.png", "link.png"])
def test_no_name_leads_out_of_the_input_folder(host, name):
    gradient().save(host.folders.root / "secret.png")
    os.symlink(host.folders.root / "secret.png", host.folders.input / "link.png")
    assert LoadImage.VALIDATE_INPUTS(name) is not True
    with pytest.raises(ValueError, match=r"leads out|Invalid image file"):
        LoadImage().load_image(name)


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "a/../../x", "..\\x", "a/%date:../../%/../../x"])
def test_no_prefix_leads_out_of_the_output_folder(host, prefix):
    with pytest.raises(ValueError, match="leads out"):
        SaveImage().save_images(torch.zeros(1, 2, 2, 3), prefix)
    assert not list(host.folders.root.rglob("*.png"))


def test_saving_numbers_files_and_writes_the_graph(host):
    images = torch.rand(2, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    prompt, workflow = {"1": {"class_type": "SaveImage", "inputs": {}}}, {"nodes": [], "name": "Größe"}
    shown = SaveImage().save_images(images, "sub/cat", prompt, {"workflow": workflow})
    assert shown["ui"]["images"] == [
        {"filename": "cat_00001_.png", "subfolder": "sub", "type": "output"},
        {"filename": "cat_00002_.png", "subfolder": "sub", "type": "output"},
    ]
    assert sorted(os.listdir(host.folders.output / "sub")) == ["cat_00001_.png", "cat_00002_.png"]
    with Image.open(host.folders.output / "sub" / "cat_00002_.png") as picture:
        assert json.loads(picture.info["prompt"]) == prompt
        assert json.loads(picture.info["workflow"]) == workflow
        assert np.array_equal(np.asarray(picture), (images[1] * 255).round().byte().numpy())
    again = SaveImage().save_images(images[:1], "sub/cat")
    assert again["ui"]["images"][0]["filename"] == "cat_00003_.png"
    other = SaveImage().save_images(images[:1], "sub/ca")
    assert other["ui"]["images"][0]["filename"] == "ca_00001_.png"


def test_every_eight_bit_value_survives_saving_and_loading(host):
    values = torch.arange(256, dtype=torch.float32).div(255).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    SaveImage().save_images(values, "v")
    image, _ = LoadImage().load_image("v_00001_.png [output]")
    assert torch.equal(image, values)


def test_values_out_of_range_are_clipped(host):
    SaveImage().save_images(torch.tensor([[[[-1.0, 0.5, 2.0]]]]), "v")
    with Image.open(host.folders.output / "v_00001_.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_prefix_tokens():
    now = datetime(2024, 3, 7, 9, 5, 2)
    assert expand_prefix("%year%-%month%-%day%/%width%x%height%", width=10, height=20, now=now) == "2024-03-07/10x20"
    assert expand_prefix("%hour%%minute%%second%", width=1, height=1, now=now) == "090502"
    assert expand_prefix("a_%date:yyyy-MM-dd_hhmmss%", width=1, height=1, now=now) == "a_2024-03-07_090502"
    assert expand_prefix("%date:d.M.yy h:m:s%", width=1, height=1, now=now) == "7.3.24 9:5:2"
    assert expand_prefix("%date%", width=1, height=1, now=now) == "20240307090502"
    assert expand_prefix("%other% 100%", width=1, height=1, now=now) == "%other% 100%"


def test_batch_numbers_and_empty_prefixes(host):
    shown = SaveImage().save_images(torch.zeros(2, 2, 2, 3), "f%batch_num%")
    assert [image["filename"] for image in shown["ui"]["images"]] == ["f0_00001_.png", "f1_00002_.png"]
    shown = SaveImage().save_images(torch.zeros(1, 2, 2, 3), "f%batch_num%")
    assert shown["ui"]["images"][0]["filename"] == "f0_00003_.png"
    for prefix in ("", "sub/"):
        files = NumberedFiles(host.folders.output, prefix, width=1, height=1)
        assert files.take(0).name == "picture_00001_.png"
        assert files.subfolder == prefix.rstrip("/")


def test_a_failed_write_leaves_nothing_behind(host, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        SaveImage().save_images(torch.zeros(1, 2, 2, 3), "x")
    assert os.listdir(host.folders.output) == []


def test_previews_go_to_the_temporary_folder(host):
    shown = PreviewImage().save_images(torch.zeros(1, 2, 2, 3), {"1": {}})["ui"]["images"][0]
    assert shown["type"] == "temp"
    assert re.fullmatch(r"ComfyUI_temp_[a-z]{5}_00001_\.png", shown["filename"])
    assert (host.folders.temp / shown["filename"]).is_file()


def test_a_graph_of_core_nodes(host):
    gradient("RGBA").save(host.folders.input / "a.png")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "out"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    workflow = {"nodes": [1]}
    status, answer = host.submit({"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}})
    assert status == 200
    assert answer["node_errors"] == {}
    host.run_next()
    entry = host.history()[answer["prompt_id"]]
    assert set(entry["outputs"]) == {"2", "3"}
    with Image.open(host.folders.output / "out_00001_.png") as picture:
        assert json.loads(picture.info["prompt"]) == prompt
        assert json.loads(picture.info["workflow"]) == workflow


def test_a_missing_picture_is_refused_before_the_run(host):
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "gone.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    status, answer = host.submit({"prompt": prompt})
    assert status == 400
    assert answer["node_errors"]["1"]["errors"][0]["details"].startswith("image - Invalid image file: gone.png")


def test_core_ids_and_inputs_are_comfyuis(host):
    info = host.object_info()
    assert info["LoadImage"]["input_order"] == {"required": ["image"]}
    assert info["LoadImage"]["output"] == ["IMAGE", "MASK"]
    assert info["LoadImage"]["input"]["required"]["image"][1]["image_upload"] is True
    assert info["LoadImageMask"]["input_order"] == {"required": ["image", "channel"]}
    assert info["LoadImageMask"]["output"] == ["MASK"]
    for name, inputs in (("SaveImage", ["images", "filename_prefix"]), ("PreviewImage", ["images"])):
        assert info[name]["input_order"] == {"required": inputs, "hidden": ["prompt", "extra_pnginfo"]}
        assert info[name]["output"] == []
        assert info[name]["output_node"] is True


def test_inside():
    base = Path("/data/output")
    assert inside(base, "a/b.png") == Path(os.path.realpath(base)) / "a" / "b.png"
    for name in ("..", "../output2/x", "/data/outputs/x", "a\0b"):
        with pytest.raises(ValueError, match="leads out"):
            inside(base, name)
