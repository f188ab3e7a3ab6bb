"""Pictures between files and tensors, and the numbered files that pictures are saved to."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, PngImagePlugin, UnidentifiedImageError

from .folders import inside

if TYPE_CHECKING:
    import torch

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

# What a picture without transparency gives as its mask, as in ComfyUI.
_EMPTY_MASK_SIZE = 64

_DATE_PARTS = {
    "d": lambda now: now.day,
    "M": lambda now: now.month,
    "y": lambda now: now.year,
    "h": lambda now: now.hour,
    "m": lambda now: now.minute,
    "s": lambda now: now.second,
}


def read_frames(path: str | os.PathLike[str]) -> list[Image.Image]:
    """The frames of a picture file, turned as their EXIF data says; only those of the first one's size.

    Raises ValueError where the file is no picture or is damaged.
    """
    try:
        with Image.open(path) as picture:
            if picture.format == "MPO":  # a photo with its preview images behind it
                return [ImageOps.exif_transpose(picture.copy())]
            frames = [ImageOps.exif_transpose(frame.copy()) for frame in ImageSequence.Iterator(picture)]
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        name = os.path.basename(os.fspath(path))
        raise ValueError(f"{name} cannot be read as a picture ({error}); save it anew as PNG or JPEG") from error
    return [frame for frame in frames if frame.size == frames[0].size]


def image_tensor(picture: Image.Image) -> torch.Tensor:
    """Float32 `[H, W, 3]`, 0..1."""
    import torch

    return torch.from_numpy(_array(reduced(picture).convert("RGB")))


def alpha_tensor(picture: Image.Image) -> torch.Tensor | None:
    """The transparency as float32 `[H, W]`, 0..1 with 1 = opaque; None where the picture has none."""
    import torch

    if "A" in picture.getbands():
        return torch.from_numpy(_array(picture.getchannel("A")))
    if picture.mode == "P" and "transparency" in picture.info:
        return torch.from_numpy(_array(picture.convert("RGBA").getchannel("A")))
    return None


def channel_tensor(picture: Image.Image, channel: str) -> torch.Tensor:
    """One of "R", "G", "B", "A" as float32 `[H, W]`, 0..1."""
    import torch

    return torch.from_numpy(_array(reduced(picture).convert("RGBA").getchannel(channel)))


def empty_mask() -> torch.Tensor:
    """The mask of a picture that has none: zeros `[64, 64]`."""
    import torch

    return torch.zeros(_EMPTY_MASK_SIZE, _EMPTY_MASK_SIZE)


def to_picture(image: torch.Tensor) -> Image.Image:
    """A float tensor `[H, W, 3 or 4 or 1]`, 0..1 (values outside are clipped), as a picture; rounded to the nearest."""
    values = image.detach().float().cpu().clamp(0, 1).mul(255).round().byte().numpy()
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def picture_metadata(prompt: dict[str, Any] | None, extra_pnginfo: dict[str, Any] | None) -> dict[str, str]:
    """The text chunks that let a picture be opened as the graph that made it: `prompt`, and `workflow` where known."""
    chunks = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return chunks | {name: json.dumps(value) for name, value in (extra_pnginfo or {}).items()}


def write_png(path: Path, picture: Image.Image, chunks: dict[str, str], *, compress_level: int = 4) -> None:
    """Write a PNG with text chunks; to another name first, so that nobody sees half a file."""
    info = PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".png.tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG", pnginfo=info, compress_level=compress_level)
        # mkstemp makes files that only their owner can read.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class NumberedFiles:
    """`prefix_00001_.png`, `prefix_00002_.png`, ... in a folder, after those that are there.

    `prefix` may name sub-folders and hold `%width%`, `%height%`, `%year%`, `%month%`, `%day%`, `%hour%`, `%minute%`,
    `%second%`, `%date:yyyy-MM-dd%` (any order of d, M, y, h, m, s) and, per picture, `%batch_num%`.
    """

    def __init__(self, directory: str | os.PathLike[str], prefix: str, *, width: int, height: int) -> None:
        base = Path(os.path.realpath(directory))
        expanded = expand_prefix(prefix, width=width, height=height)
        target = inside(base, expanded)
        # "sub/" names a folder, and resolving it would take the folder for the prefix.
        if not expanded or expanded.endswith(("/", "\\")) or target == base:
            target = target / "picture"
        self._stem = target.name
        self.directory = target.parent
        self.subfolder = "" if self.directory == base else self.directory.relative_to(base).as_posix()
        self._next = 1 + max(self._numbers(), default=0)

    def take(self, batch_index: int) -> Path:
        """The path of the next file."""
        stem = self._stem.replace("%batch_num%", str(batch_index))
        path = self.directory / f"{stem}_{self._next:05}_.png"
        self._next += 1
        return path

    def _numbers(self) -> Iterable[int]:
        stem = re.escape(self._stem).replace(re.escape("%batch_num%"), r"\d+")
        pattern = re.compile(rf"{stem}_(\d+)_?\.", re.IGNORECASE)
        names = os.listdir(self.directory) if self.directory.is_dir() else ()
        return [int(match[1]) for match in map(pattern.match, names) if match]


def expand_prefix(prefix: str, *, width: int, height: int, now: datetime | None = None) -> str:
    """`prefix` with its tokens replaced (see `NumberedFiles`); unknown tokens stay."""
    now = now or datetime.now()
    values = {
        "width": str(width),
        "height": str(height),
        "year": f"{now.year}",
        "month": f"{now.month:02}",
        "day": f"{now.day:02}",
        "hour": f"{now.hour:02}",
        "minute": f"{now.minute:02}",
        "second": f"{now.second:02}",
    }
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    prefix = prefix.replace("%date%", "%date:yyyyMMddhhmmss%")
    return re.sub(r"%date:([^%]*)%", lambda match: _formatted_date(match[1], now), prefix)


def _formatted_date(pattern: str, now: datetime) -> str:
    def part(match: re.Match[str]) -> str:
        letters = match[0]
        value = _DATE_PARTS[letters[0]](now)
        if letters[0] == "y":
            return str(value)[-2:] if len(letters) <= 2 else str(value)
        return f"{value:0{min(len(letters), 2)}}"

    return re.sub(r"(d+|M+|y+|h+|m+|s+)", part, pattern)


def reduced(picture: Image.Image) -> Image.Image:
    """16-bit and 32-bit integer grey as 8-bit grey, which Pillow would clip instead of scale."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return picture


def _array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
