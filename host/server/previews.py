"""Live previews as the binary WebSocket messages that ComfyUI's clients know."""

from __future__ import annotations

import io
import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

# The first number of a binary message.
_PICTURE, _PICTURE_WITH_METADATA = 1, 4
_FORMATS = {"JPEG": 1, "PNG": 2}
_LARGEST_SIDE = 512
_JPEG_QUALITY = 90


class PreviewFrames(NamedTuple):
    """One picture for clients that know which node it belongs to, and for those that only show it."""

    with_metadata: bytes
    plain: bytes


def preview_frames(data: dict[str, Any]) -> PreviewFrames:
    """Encode the data of a `preview` message: a picture under `image`, and the ids of its node.

    The picture is a PIL image, or what nodes made for ComfyUI hand over: (format, PIL image, largest side or None).
    """
    image = data["image"]
    kind, largest = "JPEG", None
    if isinstance(image, tuple):
        kind, image, largest = image
    kind = kind if kind in _FORMATS else "JPEG"
    # A side that a node names is what it gets, of small pictures too; the others are only kept from growing too large.
    side = largest or min(max(image.size), _LARGEST_SIDE)
    picture = _encode(image, kind, side)
    ids = {name: value for name, value in data.items() if name != "image"}
    metadata = json.dumps({**ids, "image_type": f"image/{kind.lower()}"}).encode()
    return PreviewFrames(
        struct.pack(">II", _PICTURE_WITH_METADATA, len(metadata)) + metadata + picture,
        struct.pack(">II", _PICTURE, _FORMATS[kind]) + picture,
    )


def _encode(image: Image.Image, kind: str, side: int) -> bytes:
    from PIL import ImageOps

    if max(image.size) != side:
        image = ImageOps.contain(image, (side, side))
    file = io.BytesIO()
    if kind == "JPEG":
        image.convert("RGB").save(file, "JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(file, kind, compress_level=1)
    return file.getvalue()
