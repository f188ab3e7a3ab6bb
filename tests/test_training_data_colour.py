"""Pictures with a colour profile are read with the colours that they show, by profiles written here byte by byte."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from training_data_kit import encoded

from stable_cascade_nodes.cascade_ops.training.data.pictures import read_picture

# The columns of sRGB's matrix to XYZ, adapted to D50 (IEC 61966-2-1, ICC.1:2022 annex E).
RED, GREEN, BLUE = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139)
# Those of Display P3.
P3 = (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)
WHITE = (0.9642, 1.0, 0.8249)


def s15(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space, tags, name="made for a test", kind=b"mntr", connection=b"XYZ "):
    """An ICC profile of version 2.4."""
    text = name.encode("ascii") + b"\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(4 + 4 + 2 + 1 + 67)
    copyright = b"text" + bytes(4) + b"none\0"
    tags = {b"desc": described, b"cprt": copyright, b"wtpt": b"XYZ " + bytes(4) + s15(*WHITE), **tags}
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for key, content in tags.items():
        table += key + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = bytearray(128)
    header[4:8], header[8:12], header[12:16], header[16:20] = bytes(4), b"\x02\x40\0\0", kind, space
    header[20:24], header[36:40], header[68:80] = connection, b"acsp", s15(*WHITE)
    whole = bytes(header) + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def sampled_curve(points):
    """sRGB's own curve by so many samples, between which programs draw lines."""
    values = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in np.linspace(0, 1, points)
    ]
    return b"curv" + bytes(4) + struct.pack(f">I{points}H", points, *(round(value * 65535) for value in values))


def rgb(columns, gamma, **more):
    tags = {
        key + b"XYZ": b"XYZ " + bytes(4) + s15(*column) for key, column in zip((b"r", b"g", b"b"), columns, strict=True)
    }
    drawn = curve(gamma) if isinstance(gamma, float) else gamma
    return profile(b"RGB ", tags | {key + b"TRC": drawn for key in (b"r", b"g", b"b")}, **more)


def print_colours(lightness):
    """A profile of CMYK whose every ink is grey of this lightness."""
    ramp = bytes(range(256))
    lab = bytes([round(lightness * 2.55), 128, 128]) * 2**4
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + lab + ramp * 3
    return profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, kind=b"prtr", connection=b"Lab ")


def read(image, icc, kind="PNG", **options):
    return np.asarray(read_picture(io.BytesIO(encoded(image, kind, icc_profile=icc, **options)))).astype(int)


def encode(linear):
    """sRGB's transfer function (IEC 61966-2-1), 0..255."""
    return 255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055)


LINEAR = rgb((RED, GREEN, BLUE), 1.0)


def test_what_a_profile_is_called_says_nothing():
    pixels = read(Image.new("RGB", (8, 8), (255, 0, 0)), rgb((GREEN, RED, BLUE), 1.0, name="sRGB of some camera"))
    assert np.abs(pixels - (0, 255, 0)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_are_those_of_the_profile(kind):
    for value in (20, 64, 128, 240):
        pixels = read(Image.new("RGB", (8, 8), (value,) * 3), LINEAR, kind)
        assert np.abs(pixels - encode(value / 255)).max() <= 2


def test_display_p3_keeps_its_strength():
    # By hand: linear P3 to XYZ, XYZ to linear sRGB, each by the published matrices, then sRGB's transfer function.
    colour = np.array([200, 90, 60])
    seen = np.linalg.inv(np.array([RED, GREEN, BLUE]).T) @ np.array(P3).T @ (colour / 255) ** 2.2
    expected = [encode(value) for value in seen]
    pixels = read(Image.new("RGB", (8, 8), tuple(colour)), rgb(P3, 2.2))
    assert np.abs(pixels - expected).max() <= 2
    assert pixels[0, 0, 0] >= 212  # redder than its numbers


def test_greys_transparency_and_palettes_have_profiles_too():
    grey, middle = profile(b"GRAY", {b"kTRC": curve(1.0)}), round(encode(128 / 255))
    assert np.abs(read(Image.new("L", (4, 4), 128), grey) - middle).max() <= 1
    half = Image.new("LA", (4, 4), (128, 255))
    half.paste((128, 0), (0, 0, 4, 2))
    pixels = read(half, grey)
    assert (pixels[:2] == 255).all() and np.abs(pixels[2:] - middle).max() <= 1
    half = Image.new("RGBA", (4, 4), (128, 128, 128, 255))
    half.paste((128, 128, 128, 0), (0, 0, 4, 2))
    pixels = read(half, LINEAR)
    assert (pixels[:2] == 255).all() and np.abs(pixels[2:] - middle).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 128, 128, 128])
    palette.putpixel((0, 0), 0)
    assert np.abs(read(palette, LINEAR)[1:] - middle).max() <= 1
    pixels = read(palette, LINEAR, transparency=0)
    assert (pixels[0, 0] == 255).all() and np.abs(pixels[1:] - middle).max() <= 1


def test_print_colours_are_those_of_their_profile():
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    # Lightness 50 is a linear 0.184 (CIE 15), so sRGB 119; without the profile these inks are red.
    assert np.abs(read(inks, print_colours(50), "TIFF") - encode(0.1842)).max() <= 2


@pytest.mark.parametrize(
    "icc",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb((RED, GREEN, BLUE), sampled_curve(24)),
        b"not a profile",
        LINEAR[:200],
        profile(b"GRAY", {b"kTRC": curve(1.0)}),
        print_colours(50),
        profile(b"RGB ", {}),
    ],
    ids=["sRGB", "sRGB but for rounding", "noise", "cut short", "of greys", "of inks", "empty"],
)
def test_other_profiles_change_nothing(icc):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert (read(image, icc) == np.asarray(image)).all()
