"""Colours as a picture's own profile means them, brought to sRGB, which the models were trained on."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

# How the pixels of each mode are read: without palette and transparency.
_CHANNELS = {"RGB": "RGB", "RGBA": "RGB", "P": "RGB", "L": "L", "LA": "L", "CMYK": "CMYK"}
# Of 255: profiles of sRGB from different hands differ by their rounding.
_ROUNDING = 2


def as_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB, RGB or RGBA, if it carries a profile of other colours; else the picture itself.

    Phones store Display P3 and cameras Adobe RGB: their numbers, taken for sRGB, show paler colours than the picture
    has. A profile that is damaged or not made for the picture's channels is left out of account. What sRGB cannot show
    becomes the nearest colour that it can (relative colorimetric intent).
    """
    profile, channels = image.info.get("icc_profile"), _CHANNELS.get(image.mode)
    transform = _to_srgb(profile, channels) if profile and channels else None
    if transform is None:
        return image
    alpha = None
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("LA" if channels == "L" else "RGBA")
        alpha = image.getchannel("A")
    image = ImageCms.applyTransform(image.convert(channels), transform)
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _to_srgb(profile: bytes, channels: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None where the profile does not fit or changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), channels, "RGB", intent)
    except (OSError, ImageCms.PyCMSError):
        return None
    if channels == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(len(steps), -1, 3)
    probe = Image.fromarray(colours).convert(channels)
    plain, seen = (
        np.asarray(each, dtype=int) for each in (probe.convert("RGB"), ImageCms.applyTransform(probe, transform))
    )
    return transform if np.abs(plain - seen).max() > _ROUNDING else None
