"""Picture files of all kinds become RGB pixels; broken ones say why."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_data_kit import encoded, noise

from stable_cascade_nodes.cascade_ops.training.data import pictures
from stable_cascade_nodes.cascade_ops.training.data.pictures import (
    Crop,
    PictureError,
    picture_size,
    read_maps,
    read_picture,
)

WHOLE = Crop(0, 0, 1, 1)


def opened(content):
    image = read_picture(io.BytesIO(content))
    assert image.mode == "RGB" and picture_size(io.BytesIO(content)) == image.size
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_camera_says(orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = (255, 0, 0)  # red at the top left
    upright[12:, 20:] = (0, 0, 255)  # blue at the bottom right
    turns = Image.Transpose
    # What the camera stored so that the viewer's turn makes it upright (EXIF 2.3, tag 0x0112).
    stored = {
        1: None,
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }[orientation]
    image = Image.fromarray(upright)
    image = image if stored is None else image.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = opened(encoded(image, "PNG", exif=exif))
    assert pixels.shape == upright.shape and (pixels == upright).all()


def test_transparency_is_laid_on_white():
    alpha = np.full((4, 4, 4), 255, np.uint8)
    alpha[..., :3] = (200, 0, 0)
    alpha[:2, :, 3] = 0
    alpha[2, :, 3] = 128
    pixels = opened(encoded(Image.fromarray(alpha)))
    assert (pixels[0] == 255).all() and (pixels[3] == (200, 0, 0)).all()
    assert np.abs(pixels[2] - (227, 127, 127)).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    pixels = opened(encoded(palette, "PNG", transparency=0))
    assert (pixels[0, 0] == 255).all() and (pixels[1, 1] == (40, 50, 60)).all()
    grey = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 0)])
    assert (opened(encoded(grey)) == 255).all()


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    pixels = opened(encoded(Image.fromarray(ramp)))
    # Not cut off at 255, which would make everything above 1/256 white.
    assert np.abs(pixels[0, :, 0] - np.arange(256)).max() <= 1


def test_print_colours_palettes_and_animations_become_rgb():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert (opened(encoded(cmyk, "TIFF")) == (255, 0, 0)).all()
    red = opened(encoded(cmyk, "JPEG"))[4, 4]
    assert red[0] > 200 and max(red[1:]) < 60
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert (opened(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)).all()
    assert (opened(encoded(Image.new("1", (8, 8), 1))) == 255).all()


def test_floating_point_pixels_are_refused():
    with pytest.raises(PictureError, match="floating-point"):
        read_picture(io.BytesIO(encoded(Image.new("F", (4, 4), 0.5), "TIFF")))


def test_bombs_are_not_decompressed(monkeypatch):
    content = encoded(Image.new("RGB", (300, 200)))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 59_999)
    for read in (read_picture, picture_size):
        with pytest.raises(PictureError, match="300 x 200 pixels, more than"):
            read(io.BytesIO(content))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 60_000)
    assert picture_size(io.BytesIO(content)) == (300, 200)


@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]),
    st.floats(0, 0.95),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_raise_this_error_and_no_other(kind, kept, flips):
    content = bytearray(encoded(noise((33, 21)), kind))
    for place, value in flips:
        content[int(place * len(content))] = value
    content = content[: int(len(content) * kept)]
    for read in (read_picture, picture_size):
        try:
            read(io.BytesIO(bytes(content)))
        except PictureError as error:
            assert str(error)


def test_a_cut_file_is_damaged_even_where_its_header_is_whole():
    content = encoded(noise((64, 64)))
    assert picture_size(io.BytesIO(content[: len(content) // 2])) == (64, 64)
    with pytest.raises(PictureError, match="truncated"):
        read_picture(io.BytesIO(content[: len(content) // 2]))


def test_class_maps_are_the_channels_of_a_png():
    classes = np.random.default_rng(0).integers(0, 7, (6, 8, 3), dtype=np.uint8)
    maps = read_maps(io.BytesIO(encoded(Image.fromarray(classes))), WHOLE)
    assert maps.dtype == torch.int64 and torch.equal(maps, torch.from_numpy(classes).permute(2, 0, 1).long())
    one = read_maps(io.BytesIO(encoded(Image.fromarray(classes[..., 0]))), WHOLE)
    assert torch.equal(one, maps[:1])


def test_class_maps_are_cut_like_their_picture():
    halves = np.zeros((4, 8), np.uint8)
    halves[:, 4:] = 5
    content = io.BytesIO(encoded(Image.fromarray(halves)))
    right = read_maps(content, Crop(0.5, 0, 0.5, 1))
    assert right.shape == (1, 4, 8) and (right == 5).all()
    middle = read_maps(content, Crop(0.25, 0, 0.5, 1))
    assert (middle[0] == torch.from_numpy(halves)).all()


def test_class_maps_of_other_kinds_are_refused():
    with pytest.raises(PictureError, match="mode P"):
        read_maps(io.BytesIO(encoded(Image.new("P", (4, 4)))), WHOLE)
    with pytest.raises(PictureError, match="class maps"):
        read_maps(io.BytesIO(b"nothing"), WHOLE)
