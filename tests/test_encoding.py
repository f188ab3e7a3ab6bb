"""Pictures as latents: sizes, resizing, masks and what comes back, by functions and by nodes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attachment_kit import noise, saved_latent_encoder
from golden import build, read_golden, relative_error
from nodes_kit import load, run
from PIL import Image
from test_memory import counted, empty, handle

from stable_cascade_nodes.cascade_ops import encoding, memory, stages
from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.handles import StageHandle, load_stage
from stable_cascade_nodes.cascade_ops.models import LatentEncoder, StageA
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet
from stable_cascade_nodes.cascade_ops.wires import read_latent
from stable_cascade_nodes.nodes.examples import FOLDER


@pytest.fixture(scope="module")
def tiny():
    return {stage: load_stage(bundled(stage).path, stage) for stage in ("latent_encoder", "stage_a", "previewer")}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = saved_latent_encoder(tmp_path_factory.mktemp("encoder") / "e.safetensors")
    return load_stage(path, "latent_encoder")


@pytest.fixture
def host(fuller_host):
    return fuller_host


def example(name, size=256):
    with Image.open(FOLDER / f"{name}.png") as file:
        pixels = np.asarray(file.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), np.float32)
    return torch.from_numpy(pixels)[None] / 255


def psnr(one, other):
    return -10 * torch.log10(((one - other) ** 2).mean()).item()


def half_mask(height, width):
    """The right half."""
    mask = torch.zeros(1, height, width)
    mask[:, :, width // 2 :] = 1
    return mask


# Stage C -------------------------------------------------------------------------------------------------------


def test_a_picture_becomes_the_latent_of_the_reference():
    """The golden picture has three quarters of the size asked for, at which nothing is resized."""
    values, metadata = read_golden("effnet_encoder")
    info = SimpleNamespace(parameters=20_000_000, size="", rank=1)
    golden = StageHandle("latent_encoder", build(LatentEncoder, metadata), info, "golden")
    latent = encoding.encode_stage_c(golden, values["image"].permute(0, 2, 3, 1), 341, 256)
    assert relative_error(latent.samples, values["latent"]) < 1e-3
    assert (latent.width, latent.height, latent.family) == (341, 256, "release")


@pytest.mark.parametrize(
    ("width", "height", "cells"), [(0, 0, (2, 3)), (256, 256, (6, 6)), (0, 256, (6, 11)), (129, 128, (3, 4))]
)
def test_the_latent_has_the_size_of_the_picture_to_make(encoder, width, height, cells):
    latent = encoding.encode_stage_c(encoder, noise(2, 60, 100, 3), width, height)
    assert latent.samples.shape == (2, 16, *cells)
    assert latent.stage_c_pixels() == (latent.height, latent.width)
    assert (latent.width, latent.height) == (width or round(height / 0.6) or 100, height or 60)
    assert read_latent(latent.to_wire()).stage_c_pixels() == latent.stage_c_pixels()


def test_the_encoder_sees_three_quarters_normalised_and_smooth_or_nearest(encoder):
    picture = noise(1, 128, 128, 3)
    first = picture.permute(0, 3, 1, 2)
    for resize, small in (
        ("smooth", F.interpolate(first, size=(96, 96), mode="bilinear", antialias=True)),
        ("nearest", F.interpolate(first, size=(96, 96), mode="nearest")),
    ):
        latent = encoding.encode_stage_c(encoder, picture, resize=resize)
        with torch.no_grad():
            assert torch.equal(latent.samples, encoder.module(normalize_imagenet(small)))
    assert torch.equal(
        encoding.encode_stage_c(encoder, picture).samples,
        encoding.encode_stage_c(encoder, picture, resize="smooth").samples,
    )


def test_a_large_picture_is_made_smaller_unless_a_size_is_asked_for(encoder, tiny):
    large = noise(1, 20, 3000, 3)
    latent = encoding.encode_stage_c(encoder, large)
    assert (latent.width, latent.height) == (2560, 16) and latent.samples.shape[-1] == 60
    assert encoding.encode_stage_c(encoder, large, 3000).samples.shape[-1] == 71
    finer = encoding.encode_stage_c(encoder, large, compression=64.0)
    assert (finer.width, finer.samples.shape[-1], finer.compression) == (3000, 47, 64.0)
    assert read_latent(finer.to_wire()).stage_c_pixels() == (20, 3000)
    known = encoding.encode_stage_c(tiny["latent_encoder"], noise(1, 300, 512, 3))
    assert (known.width, known.height, known.family) == (256, 152, "tiny")


def test_crop_takes_the_middle_and_stretch_all(tiny):
    picture, encode = (
        example("two"),
        lambda *inputs, **more: encoding.encode_stage_c(tiny["latent_encoder"], *inputs, **more),
    )
    middle = encode(picture[:, :, 64:192], 128, 256)
    assert torch.equal(encode(picture, 128, 256).samples, middle.samples)
    narrow = F.interpolate(picture.permute(0, 3, 1, 2), size=(192, 96), mode="bilinear", antialias=True)
    with torch.no_grad():
        stretched = tiny["latent_encoder"].module(normalize_imagenet(narrow[..., :96]))
    assert encode(picture, 128, 256, fit="stretch").samples.shape == stretched.shape
    torch.testing.assert_close(encode(picture, 128, 256, fit="stretch").samples, stretched)
    assert (stretched - middle.samples).abs().max() > 0.1


def test_the_latent_shows_the_picture(tiny):
    """Through the previewer, and better than any other picture's."""
    names = ("circle", "cross", "triangle", "square")
    pictures = torch.cat([example(name) for name in names])
    latent = encoding.encode_stage_c(tiny["latent_encoder"], pictures)
    shown = stages.preview_latent(tiny["previewer"], latent)
    small = F.interpolate(pictures.permute(0, 3, 1, 2), size=shown.shape[1:3], mode="area").permute(0, 2, 3, 1)
    errors = torch.stack([((each - small) ** 2).mean(dim=(1, 2, 3)) for each in shown])
    assert errors.argmin(dim=1).tolist() == [0, 1, 2, 3] and errors.diagonal().max() < 0.02


# Stage A -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 104), (60, 100), (61, 97), (1, 9)])
def test_decoding_gives_back_the_size_to_the_pixel(handles, height, width):
    latent = encoding.encode_stage_a(handles["stage_a"], noise(2, height, width, 3))
    assert latent.samples.shape == (2, 4, -(-height // 8) * 2, -(-width // 8) * 2)
    back = read_latent(latent.to_wire("stage_b"), "stage_b")
    assert stages.decode_stage_a(handles["stage_a"], back).shape == (2, height, width, 3)
    torch.testing.assert_close(back.samples, latent.samples)


def test_decoding_gives_back_the_picture(tiny):
    stage_a = tiny["stage_a"]
    for picture in (example("circle"), example("striped")[:, :250, :203]):
        back = stages.decode_stage_a(stage_a, encoding.encode_stage_a(stage_a, picture))
        assert back.shape == picture.shape and psnr(back, picture) > 35
        # The last rows and columns, which lie beside the padding, are as good.
        assert psnr(back[:, -3:], picture[:, -3:]) > 30 and psnr(back[:, :, -3:], picture[:, :, -3:]) > 30


def test_pictures_of_a_batch_do_not_meet(tiny):
    pair = torch.cat([example(name, 64) for name in ("circle", "cross")])
    encoders = {"stage_a": encoding.encode_stage_a, "latent_encoder": encoding.encode_stage_c}
    for stage, encode in ((tiny[name], encode) for name, encode in encoders.items()):
        done = []
        together = encode(stage, pair, callback=done.append).samples
        assert torch.equal(together[1:], encode(stage, pair[1:]).samples) and done == [1, 2]
        assert (together[0] - together[1]).abs().max() > 0.1


# Masks ---------------------------------------------------------------------------------------------------------


def test_masks_go_into_the_latent_with_the_picture(handles, encoder):
    picture, mask = noise(2, 61, 101, 3), half_mask(61, 101)
    latent = encoding.encode_stage_c(encoder, picture, mask=mask)
    assert torch.equal(latent.mask, mask[:, None])
    cut = encoding.encode_stage_c(encoder, picture, 61, 61, mask=mask)
    assert cut.mask.shape == (1, 1, 61, 61) and torch.equal(cut.mask, mask[:, None, :, 20:81])
    padded = encoding.encode_stage_a(handles["stage_a"], picture, mask=mask)
    assert padded.mask.shape == (1, 1, 64, 104) and torch.equal(padded.mask[..., :61, :101], mask[:, None])
    assert padded.mask[..., 101:].min() == 1 and padded.to_wire("stage_b")["noise_mask"] is padded.mask
    for encode, stage in ((encoding.encode_stage_c, encoder), (encoding.encode_stage_a, handles["stage_a"])):
        assert encode(stage, picture).mask is None
        with pytest.raises(ValueError, match="1 masks of 64 x 64 for 2 pictures of 101 x 61"):
            encode(stage, picture, mask=torch.zeros(1, 64, 64))


# Refusals ------------------------------------------------------------------------------------------------------


def test_what_is_no_picture_or_another_model_is_refused(handles, encoder):
    with pytest.raises(ValueError, match="no way to resize called 'bicubic': choose one of smooth, nearest"):
        encoding.encode_stage_c(encoder, noise(1, 64, 64, 3), resize="bicubic")
    with pytest.raises(ValueError, match="was given where a latent encoder is read"):
        encoding.encode_stage_c(handles["stage_a"], noise(1, 64, 64, 3))
    with pytest.raises(ValueError, match="was given where a Stage A is read"):
        encoding.encode_stage_a(encoder, noise(1, 64, 64, 3))
    for stage, encode in ((encoder, encoding.encode_stage_c), (handles["stage_a"], encoding.encode_stage_a)):
        with pytest.raises(ValueError, match="expected pictures"):
            encode(stage, noise(1, 3, 64, 64))
    with pytest.raises(ValueError, match="compression is 2, expected 0"):
        encoding.encode_stage_c(encoder, noise(1, 64, 64, 3), compression=2.0)


# Nodes ---------------------------------------------------------------------------------------------------------


def test_nodes_say_what_they_made_and_hand_on_what_fits(host):
    inputs = {"latent_encoder": load("CascadeLoadLatentEncoder"), "image": noise(1, 80, 200, 4)}
    made = run("CascadeEncodeStageC", **inputs, width=100, height=80, fit="crop", mask=half_mask(80, 200))
    latent, image, mask = made["result"]
    assert made["ui"]["text"] == [
        "100 x 80 pixels, Stage C latent 3 x 2, batch of 1",
        "of 200 x 80 the middle 100 x 80",
        "50.0% of the picture is to be made anew",
    ]
    assert latent["samples"].shape == (1, 16, 2, 3) and (latent["width"], latent["height"]) == (100, 80)
    assert torch.equal(image, inputs["image"][:, :, 50:150, :3])
    assert torch.equal(mask, half_mask(80, 100)) and torch.equal(latent["noise_mask"][:, 0], mask)
    assert host.seen == [(1, 1, None)]
    small = run("CascadeEncodeStageA", stage_a=load("CascadeLoadStageA"), image=image, mask=mask)
    assert small["ui"]["text"] == [
        "100 x 80 pixels, Stage B latent 26 x 20, batch of 1", "50.0% of the picture is to be made anew",
    ]  # fmt: skip
    assert small["result"][0]["samples"].shape == (1, 4, 20, 26)
    stages_placed = [stages for stages, _ in host.placings]
    assert stages_placed == [["latent_encoder"], ["stage_a"]] and all(bytes > 0 for _, bytes in host.placings)


def test_without_a_mask_everything_is_to_be_made(host):
    inputs = {"latent_encoder": load("CascadeLoadLatentEncoder"), "image": noise(2, 60, 100, 3)}
    made = run("CascadeEncodeStageC", **inputs, width=0, height=0, fit="crop")
    latent, image, mask = made["result"]
    assert "noise_mask" not in latent and torch.equal(mask, torch.ones(1, 60, 100))
    assert torch.equal(image, inputs["image"])
    for change in ({"resize": "nearest"}, {"compression": 33.0}):
        other = run("CascadeEncodeStageC", **inputs, width=0, height=0, fit="crop", **change)["result"][0]
        assert other["samples"].shape != latent["samples"].shape or not torch.equal(other["samples"], latent["samples"])


def test_a_run_can_be_stopped_between_pictures(host):
    pair = noise(2, 64, 64, 3)
    host.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run("CascadeEncodeStageA", stage_a=load("CascadeLoadStageA"), image=pair)
    with pytest.raises(KeyboardInterrupt):
        run(
            "CascadeEncodeStageC",
            latent_encoder=load("CascadeLoadLatentEncoder"), image=pair, width=0, height=0, fit="crop",
        )  # fmt: skip


def test_the_mask_nodes_say_what_they_made(host):
    made = run("CascadeFeatherMask", mask=half_mask(40, 40), grow=4, feather=0)
    assert made["ui"]["text"] == ["50.0% of the picture was masked, now 60.0%, with an edge of 0 pixels"]
    assert made["result"][0].sum() == 40 * 24
    assert torch.equal(
        run("CascadeFeatherMask", mask=half_mask(40, 40)[0], grow=4, feather=0)["result"][0], made["result"][0]
    )
    sides = {"left": 0, "top": 0, "right": 40, "bottom": 0}
    padded = run("CascadePadForOutpainting", image=noise(1, 40, 40, 3), **sides, feather=8)
    assert padded["ui"]["text"] == ["40 x 40 became 80 x 40, 55.0% is new"]
    assert [each.shape for each in padded["result"]] == [(1, 40, 80, 3), (1, 40, 80)]


def test_memory_that_stage_a_needs_to_encode():
    stage_a = handle("stage_a", StageA, torch.float32)
    for side in (256, 1024):
        estimate = memory.autoencoding_bytes(stage_a, (1, 4, side // 4, side // 4))
        assert 1 < estimate / counted(stage_a, lambda model, side=side: model.encode(empty(1, 3, side, side))) < 1.4
