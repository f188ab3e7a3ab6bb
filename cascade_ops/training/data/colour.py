"""Colours as a picture's own profile means them, brought to sRGB, which the models were trained on."""

from __future__ import annotations

import io

from PIL import Image, ImageCms

# What may carry a profile of which kind of colours (ICC.1:2022, table 19), and the mode that its pixels are read in.
_MODES = {"RGB ": ("RGB", "RGBA", "P"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}
_ALPHA = ("RGBA", "LA")


def as_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB, RGB or RGBA, if it carries a profile of other colours; else the picture itself.

    Phones store Display P3 and cameras Adobe RGB: their numbers, taken for sRGB, show paler colours than the picture
    has. A profile that is damaged or not made for the picture's channels is left out of account. What sRGB cannot show
    becomes the nearest colour that it can (relative colorimetric intent).
    """
    source = _profile(image)
    if source is None:
        return image
    pixels, alpha = image, None
    if image.mode in _ALPHA or "transparency" in image.info:
        pixels = image.convert("LA" if image.mode.startswith("L") else "RGBA")
        alpha = pixels.getchannel("A")
    if pixels.mode not in ("L", "CMYK"):
        pixels = pixels.convert("L" if pixels.mode == "LA" else "RGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        pixels = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB"), intent, outputMode="RGB")
    except ImageCms.PyCMSError:
        return image
    if alpha is not None:
        pixels.putalpha(alpha)
    return pixels


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The picture's profile, if it says anything but sRGB about pixels of this mode."""
    content = image.info.get("icc_profile")
    if not content:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = ImageCms.getProfileDescription(profile)
    except (OSError, ImageCms.PyCMSError):
        return None
    fits = image.mode in _MODES.get(profile.profile.xcolor_space, ())
    return profile if fits and "sRGB" not in name else None
