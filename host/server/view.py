"""`/view`: files of the input, output and temporary folders, whole or as pictures in another form."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path

from aiohttp import web
from PIL import Image, ImageOps, UnidentifiedImageError

from ..folders import split_annotation
from ..pictures import reduced
from .context import Server
from .files import UnsafeName, check_name, content_disposition, safe_path, user_file

_DEFAULT_QUALITY = 90
_FORMATS = {"webp": "WEBP", "jpeg": "JPEG"}


def routes(server: Server) -> list[web.RouteDef]:
    async def view(request: web.Request) -> web.StreamResponse:
        query = request.query
        if "filename" not in query:
            return web.Response(status=404)
        name, kind = split_annotation(query["filename"], query.get("type", "output"))
        try:
            folder = server.folders.directory(kind)
            if not check_name(name):
                return web.Response(status=400)
        except ValueError:
            return web.Response(status=400)
        try:
            path = safe_path(folder, "/".join(filter(None, (query.get("subfolder"), name))))
        except UnsafeName:
            return web.Response(status=403)
        if not os.path.isfile(path):
            return web.Response(status=404)
        if "preview" in query:
            form, _, quality = query["preview"].partition(";")
            return await _picture(path, _FORMATS.get(form, "WEBP"), quality=_quality(quality))
        if query.get("channel") in ("rgb", "a"):
            return await _picture(path, "PNG", channel=query["channel"])
        return user_file(path)

    return [web.get("/view", view)]


def converted(path: Path, form: str, *, quality: int = _DEFAULT_QUALITY, channel: str = "rgba") -> bytes:
    """The first frame of a picture file as WEBP, JPEG or PNG, turned the way its EXIF data says and without metadata.

    `channel`: "rgba" keeps the picture, "rgb" drops its transparency, "a" is black with the picture's transparency.
    Raises ValueError where the file is no picture or a damaged one.
    """
    try:
        with Image.open(path) as picture:
            # The profile says what the numbers mean; other metadata stays behind.
            profile = picture.info.get("icc_profile") if picture.mode in ("RGB", "RGBA") else None
            image = reduced(ImageOps.exif_transpose(picture))
            transparent = "A" in image.getbands() or "transparency" in image.info
            if channel == "a":
                image = _black_with_alpha(image.convert("RGBA"))
            else:
                keep_alpha = transparent and channel == "rgba" and form != "JPEG"
                image = image.convert("RGBA" if keep_alpha else "RGB")
            image.info = {}
            file = io.BytesIO()
            image.save(file, format=form, quality=quality, icc_profile=profile)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} cannot be read as a picture ({error}); ask for it without preview") from error
    return file.getvalue()


async def _picture(path: Path, form: str, *, quality: int = _DEFAULT_QUALITY, channel: str = "rgba") -> web.Response:
    content = await asyncio.to_thread(converted, path, form, quality=quality, channel=channel)
    headers = {
        "Content-Disposition": content_disposition("inline", f"{path.stem}.{form.lower()}"),
        "Cache-Control": "no-cache",
    }
    return web.Response(body=content, content_type=f"image/{form.lower()}", headers=headers)


def _black_with_alpha(image: Image.Image) -> Image.Image:
    black = Image.new("RGBA", image.size, (0, 0, 0, 0))
    black.putalpha(image.getchannel("A"))
    return black


def _quality(text: str) -> int:
    return min(max(int(text), 1), 100) if text.isascii() and text.isdigit() and len(text) < 4 else _DEFAULT_QUALITY
