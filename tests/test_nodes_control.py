"""The nodes for ControlNets and what they read, called by hand."""

import shutil

import pytest
import torch
from attachment_kit import controlled, noise, samples, saved_adapter, saved_controlnet
from nodes_kit import load, run, sample_c

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops import catalog, control, stages
from stable_cascade_nodes.cascade_ops.wires import Latent
from stable_cascade_nodes.nodes import files

KINDS = ("canny", "inpainting", "super_resolution")


@pytest.fixture
def host(fuller_host):
    return fuller_host


# Files ---------------------------------------------------------------------------------------------------------


def test_controlnets_are_told_apart_by_what_is_in_them(host, more_models):
    for kind, name in (("canny", "ca"), ("inpainting", "in"), ("super_resolution", "su")):
        for choice in (f"auto ({kind})", f"{name}.safetensors"):
            said = run("CascadeLoadControlNet", file=choice)["ui"]["text"]
            assert said == [f"ControlNet custom {kind.replace('_', ' ')} ({name}.safetensors), float32"]
    listed = NODE_CLASS_MAPPINGS["CascadeLoadControlNet"].INPUT_TYPES()["required"]["file"][0]
    kinds = list(control.CONTROL_KINDS)
    assert list(catalog.CONTROL_KINDS) == kinds
    assert listed[:8] == [f"auto ({kind})" for kind in kinds] + [f"tiny {kind} (bundled)" for kind in kinds]
    assert listed[8:] == ["ca.safetensors", "in.safetensors", "ip.safetensors", "su.safetensors"]
    with pytest.raises(ValueError, match=r"ip.safetensors holds IP-Adapter custom, expected ControlNet"):
        load("CascadeLoadControlNet", file="ip.safetensors")


def test_auto_takes_only_what_fits_the_stage_c(empty_host, small_family, more_models):
    models = shutil.copytree(small_family.models, empty_host / "models")
    (models / "controlnet").mkdir()
    saved_controlnet(models / "controlnet/wide.safetensors", "canny", c_proj=128)
    saved_controlnet(models / "controlnet/deep.safetensors", "canny", proj_blocks=[0, 60])
    saved_adapter(models / "controlnet/other.safetensors", c_hidden_per_block=[32] * 4)
    for stage, choice in (("controlnet", "auto (canny)"), ("ip_adapter", "auto")):
        with pytest.raises(ValueError, match=r"No (controlnet_canny|ip_adapter) file was found and this installation"):
            files.find(stage, choice)
    saved_controlnet(models / "controlnet/fits.safetensors", "canny")
    saved_adapter(models / "controlnet/fits too.safetensors")
    assert files.find("controlnet", "auto (canny)").name == "fits.safetensors"
    assert files.find("ip_adapter", "auto").name == "fits too.safetensors"


def test_the_bundled_ones_are_chosen_by_kind(empty_host):
    (empty_host / "weights").mkdir()
    for kind in KINDS:
        saved_controlnet(empty_host / f"weights/controlnet_{kind}.safetensors", kind)
    for choice in ("auto ({})", "tiny {} (bundled)"):
        for kind in KINDS:
            handle = load("CascadeLoadControlNet", file=choice.format(kind))
            assert handle.info.control["kind"] == kind
            assert handle.title == f"ControlNet custom {kind.replace('_', ' ')} (bundled)"


# Controls ------------------------------------------------------------------------------------------------------


def test_canny_shows_its_edges(host):
    image = torch.zeros(2, 60, 100, 3)
    image[1, 20:40, 30:70] = 1
    made = run("CascadeCannyControl", image=image, low=100, high=200, side=224)
    edges, shown = made["result"]
    assert edges.kind == "canny" and edges.samples.shape == (2, 1, 64, 96) and edges.size == (60, 100)
    assert shown.shape == (2, 64, 96, 3) and shown[0].max() == 0 and shown[1].max() > 0.2
    assert torch.equal(shown[..., 0], edges.samples[:, 0])
    assert made["ui"]["text"][0].startswith("control for canny of a picture of 100 x 60: ")
    fine = run("CascadeCannyControl", image=image, low=100, high=200, side=0)["result"][0]
    assert fine.samples.shape == (2, 1, 60, 100) and set(fine.samples.unique().tolist()) == {0.0, 1.0}
    none = run("CascadeCannyControl", image=image * 0.1, low=2000, high=2040, side=0)["result"][0]
    assert none.samples.max() == 0


def test_canny_is_what_the_controlnet_learned_from(host):
    """As in training: the picture at three quarters of its size, edges at 224."""
    image = noise(1, 1024, 1024, 3)
    made = run("CascadeCannyControl", image=image, low=100, high=200, side=224)["result"][0]
    expected = control.canny_control(control.control_picture(image.permute(0, 3, 1, 2), 24, 24))
    assert torch.equal(made.samples, expected)
    larger = run("CascadeCannyControl", image=noise(1, 2048, 3072, 3), low=100, high=200, side=224)["result"][0]
    assert larger.samples.shape[2] < 1024 and larger.size == (2048, 3072)


def test_inpainting_shows_its_hole(host):
    image, mask = noise(2, 60, 100, 3), torch.zeros(1, 60, 100)
    mask[:, :, 50:] = 1
    made = run("CascadeInpaintControl", image=image, mask=mask)
    hole, shown = made["result"]
    assert hole.kind == "inpainting" and hole.samples.shape == (2, 4, 64, 96)
    assert (shown[:, :, 50:] == 1).all() and (shown[:, :, :46] < 1).any()
    assert made["ui"]["text"] == [
        "control for inpainting of a picture of 100 x 60: 50.0% of the picture is to be made anew"
    ]
    for bad in (torch.zeros(1, 64, 64), torch.zeros(3, 60, 100)):
        rows, columns = bad.shape[1:]
        words = f"{len(bad)} masks of {columns} x {rows} for 2 pictures of 100 x 60"
        with pytest.raises(ValueError, match=words):
            run("CascadeInpaintControl", image=image, mask=bad)
    half = run("CascadeInpaintControl", image=image, mask=torch.nn.functional.avg_pool2d(mask, 2))["result"][0]
    assert torch.equal(half.samples[:, 3], hole.samples[:, 3])


def test_super_resolution_encodes_the_picture(host):
    encoder = load("CascadeLoadLatentEncoder")
    made = run("CascadeSuperResolutionControl", latent_encoder=encoder, image=noise(2, 60, 100, 3))
    latents, shown, *size = made["result"]
    assert latents.samples.shape == (2, 16, 4, 8) and shown.shape == (2, 64, 128, 3) and size == [200, 120]
    assert torch.equal(latents.samples[:, :, ::2, ::2], latents.samples[:, :, 1::2, 1::2])
    assert made["ui"]["text"] == ["control for super_resolution of a picture of 100 x 60: twice as large is 200 x 120"]
    assert host.placings[-1][0] == ["latent_encoder"] and host.placings[-1][1] > 0
    previewer = load("CascadeLoadPreviewer")
    inputs = {"latent_encoder": encoder, "image": noise(2, 60, 100, 3), "previewer": previewer}
    again = run("CascadeSuperResolutionControl", **inputs)
    assert torch.equal(again["result"][0].samples, latents.samples)
    assert torch.equal(again["result"][1], stages.preview_latent(previewer, Latent(latents.samples)))
    assert again["result"][1].shape == (2, 32, 64, 3)
    assert host.placings[-1][0] == ["latent_encoder", "previewer"]
    with pytest.raises(ValueError, match="was given where a latent encoder is read"):
        run("CascadeSuperResolutionControl", latent_encoder=load("CascadeLoadPreviewer"), image=noise(1, 32, 32, 3))


@pytest.mark.parametrize("image", [torch.zeros(60, 100, 3), torch.zeros(1, 60, 100, 1), "a picture"])
def test_what_is_no_picture_is_refused(host, image):
    with pytest.raises(ValueError, match=r"The image input holds .*connect an image"):
        run("CascadeCannyControl", image=image, low=100, high=200, side=224)


# Applying ------------------------------------------------------------------------------------------------------


def test_a_controlnet_changes_the_picture_and_is_placed_with_stage_c(host):
    plain, _ = sample_c(host)
    memory = host.placings[-1][1]
    applied = controlled()
    assert applied["ui"]["text"] == ["ControlNet custom canny (ca.safetensors) at 1"]
    answer, _ = sample_c(host, stage_c=applied["result"][0])
    assert host.placings[-1][0] == ["stage_c", "controlnet"] and host.placings[-1][1] > memory
    assert (samples(answer) - samples(plain)).abs().max() > 1e-3
    assert answer["ui"]["text"][1:] == ["with ControlNet custom canny (ca.safetensors) at 1"]
    off, _ = sample_c(host, stage_c=controlled(strength=0.0)["result"][0])
    assert torch.equal(samples(off), samples(plain)) and host.placings[-1] == (["stage_c"], memory)
    part = controlled(strength=0.5, start=0.8, end=0.2)["ui"]["text"]
    assert part == ["ControlNet custom canny (ca.safetensors) at 0.5 from 0.8 to 0.2"]


def test_what_stage_c_carries_moves_to_the_device_and_the_wire_stays(host, monkeypatch):
    from stable_cascade_nodes.nodes import runtime

    handle = controlled()["result"][0]
    handle = controlled(stage_c=handle, strength=0.3)["result"][0]
    monkeypatch.setattr(host, "_device", torch.device("meta"))
    previewer = load("CascadeLoadPreviewer")
    moved, shower = runtime.placed([handle, previewer])
    assert host.placings[-1][0] == ["stage_c", "previewer", "controlnet", "controlnet"]
    assert shower.stage == "previewer"
    assert {each.network.device.type for each in moved.controls} == {"meta"} == {moved.device.type}
    assert {each.network.device.type for each in handle.controls} == {"cpu"}
