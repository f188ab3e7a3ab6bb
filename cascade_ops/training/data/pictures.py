"""From the bytes of a picture file to pixels, whatever cameras and programs put into such files."""

from __future__ import annotations

from pathlib import PurePath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .colour import as_srgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

# Pillow's own limit for what it calls a decompression bomb: half a gigabyte of RGB.
MAX_PIXELS = 178_956_970
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


class PictureError(ValueError):
    """A picture cannot be read; the message says why in a few words."""


class Crop(NamedTuple):
    """The part of a picture that is kept: left, top, width and height as fractions of the whole picture's sides."""

    left: float
    top: float
    width: float
    height: float


def is_picture(name: str) -> bool:
    """Whether a file of this name is taken for a picture."""
    return PurePath(name).suffix.lower() in SUFFIXES


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """Pixels ``(width, height)`` as the picture is shown, from the file's header.

    Raises:
        PictureError: not a picture, or one of more than MAX_PIXELS.
    """
    try:
        with Image.open(file) as image:
            width, height = _checked_size(image)
            # Pillow would decode a whole PNG to look for EXIF behind its pixels.
            late = image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()
            turned = not late and image.getexif().get(_ORIENTATION) in _TURNED
    except PictureError:
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged bytes
        raise PictureError(_why(error)) from error
    return (height, width) if turned else (width, height)


def read_picture(file: BinaryIO) -> Image.Image:
    """The picture as sRGB, 8 bits a channel, turned the way its EXIF orientation says.

    Colours of a profile in the file are converted, see `as_srgb`. Transparency is laid on white; of an animation the
    first frame counts; 16-bit greys keep their upper 8 bits.

    Raises:
        PictureError: not a picture, damaged, cut short, or of more than MAX_PIXELS.
    """
    try:
        with Image.open(file) as image:
            _checked_size(image)
            image.load()
            return _as_rgb(as_srgb(ImageOps.exif_transpose(image)))
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(_why(error)) from error


def crop_to(
    image: Image.Image, width: int, height: int, across: float = 0.5, down: float = 0.5
) -> tuple[Image.Image, Crop]:
    """The picture at exactly `width` x `height`: scaled until it covers that, the rest cut off.

    across, down: where to cut, 0 keeps the left or top edge, 1 the right or bottom one, 0.5 the middle. Scaled with
    Pillow's bicubic filter, whose support grows when it shrinks a picture.
    """
    scale = max(width / image.width, height / image.height)
    kept_width, kept_height = min(image.width, width / scale), min(image.height, height / scale)
    left, top = (image.width - kept_width) * across, (image.height - kept_height) * down
    crop = Crop(left / image.width, top / image.height, kept_width / image.width, kept_height / image.height)
    if (width, height) == image.size:
        return image, crop
    box = (left, top, min(image.width, left + kept_width), min(image.height, top + kept_height))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box), crop


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 ``[3, H, W]``, 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def as_image(picture: Tensor) -> Image.Image:
    """A picture ``[H, W, 3]``, 0..1, rounded to 8 bits."""
    return Image.fromarray(picture.detach().float().clamp(0, 1).mul(255).round().byte().cpu().numpy())


def read_maps(file: BinaryIO, crop: Crop) -> Tensor:
    """The class maps that are the channels of a PNG, int64 ``[K, m, n]``, cut like their picture to the same size.

    Raises:
        PictureError: the file is no picture, or has other channels than 8-bit integers.
    """
    try:
        with Image.open(file) as image:
            _checked_size(image)
            image.load()
            if image.mode not in ("L", "LA", "RGB", "RGBA"):
                raise PictureError(f"class maps of mode {image.mode}, expected one to four channels of 8 bits")
            width, height = image.size
            box = (crop.left * width, crop.top * height)
            box = (*box, min(width, box[0] + crop.width * width), min(height, box[1] + crop.height * height))
            channels = [band.resize(image.size, Image.Resampling.NEAREST, box=box) for band in image.split()]
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(f"its class maps: {_why(error)}") from error
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).long()


def _checked_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} that are read")
    return width, height


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise PictureError("floating-point pixels, expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion would cut them off at 255
        upper = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 256
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _why(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "far more pixels than are read"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture that Pillow knows"
    return str(error).strip() or type(error).__name__
