"""`/upload/image` and `/upload/mask`: files that users bring into the input folder (or another data folder)."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..folders import DataFolders
from . import context
from .context import Server
from .files import Incoming, UnsafeName, check_name, safe_path, too_large
from .json_data import json_response

_CHUNK = 256 * 1024
# Everything in a form besides the picture is short.
_LARGEST_FIELD = 64 * 1024
_MOST_PARTS = 32


def routes(server: Server) -> list[web.RouteDef]:
    folders = server.folders
    # Two uploads of one name must not both find it free.
    placing = threading.Lock()

    async def upload_image(request: web.Request) -> web.Response:
        return await receive(request, None)

    async def upload_mask(request: web.Request) -> web.Response:
        return await receive(request, _masked)

    async def receive(request: web.Request, change: Any) -> web.Response:
        if request.content_type != "multipart/form-data":
            return web.Response(status=400)
        if (request.content_length or 0) > context.MAX_UPLOAD_SIZE + _LARGEST_FIELD:
            raise too_large(context.MAX_UPLOAD_SIZE)
        with Incoming(folders.temp) as incoming:
            try:
                form = await _read_form(request, incoming)
            except HttpProcessingError as error:  # the head of a part is not one
                raise ValueError(f"the form cannot be read: {error.message}") from error
            if form.name is None:
                return web.Response(status=400)
            return json_response(await asyncio.to_thread(finish, incoming, form, change))

    def finish(incoming: Incoming, form: _Form, change: Any) -> dict[str, str]:
        kind = form.fields.get("type", "input")
        folder = folders.directory(kind)
        name = _file_name(form.name or "")
        subfolder = "/".join(check_name(form.fields.get("subfolder", ""), writing=True))
        if change is not None:
            with Incoming(folders.temp) as changed:
                change(folders, incoming, form, changed)
                name = Path(name).with_suffix(".png").name
                return place(changed, folder, subfolder, name, kind, form)
        return place(incoming, folder, subfolder, name, kind, form)

    def place(incoming: Incoming, folder: Path, subfolder: str, name: str, kind: str, form: _Form) -> dict[str, str]:
        overwrite = form.fields.get("overwrite") in ("true", "1")
        with placing:
            name = _place(incoming, folder, subfolder, name, overwrite=overwrite)
        return {"name": name, "subfolder": subfolder, "type": kind}

    return [web.post("/upload/image", upload_image), web.post("/upload/mask", upload_mask)]


@dataclass
class _Form:
    """What came beside the picture; `name` is the file name that the picture came with, None without a picture."""

    name: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


async def _read_form(request: web.Request, incoming: Incoming) -> _Form:
    """Read a whole form, its picture into `incoming`; ValueError where it is not one."""
    form = _Form()
    reader = await request.multipart()
    for _ in range(_MOST_PARTS):
        part = await reader.next()
        if part is None:
            return form
        if not isinstance(part, BodyPartReader):
            raise ValueError("a part of the form holds parts of its own; send one part for each field")
        if part.name == "image" and form.name is None and part.filename is not None:
            form.name = part.filename
            await incoming.receive(_chunks(part), context.MAX_UPLOAD_SIZE)
        else:
            form.fields[part.name or ""] = await _text(part)
    raise ValueError(f"the form has more than {_MOST_PARTS} parts; send the picture and its few fields")


async def _chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(_CHUNK):
        yield chunk


async def _text(part: BodyPartReader) -> str:
    content = bytearray()
    async for chunk in _chunks(part):
        content += chunk
        if len(content) > _LARGEST_FIELD:
            raise too_large(_LARGEST_FIELD)
    return content.decode()


def _file_name(name: str) -> str:
    """`name` where it is that of a file and of no folder; it is where the file goes, so it must fit every system."""
    parts = check_name(name, writing=True)
    if len(parts) != 1 or parts[0] != name:
        raise UnsafeName(f"{name!r} is not a file name; send a name without folders, and the folder as subfolder")
    return name


def _place(incoming: Incoming, folder: Path, subfolder: str, name: str, *, overwrite: bool) -> str:
    """Put a received file into its folder; returns the name that it has there."""
    stem, suffix = os.path.splitext(name)
    for number in itertools.count():
        candidate = name if number == 0 else f"{stem} ({number}){suffix}"
        path = safe_path(folder, "/".join(filter(None, (subfolder, candidate))), writing=True)
        if incoming.same_as(path):
            return candidate
        if overwrite or not os.path.lexists(path):
            incoming.place(path)
            return candidate
    raise AssertionError("the numbers have ended")


def _masked(folders: DataFolders, mask: Incoming, form: _Form, result: Incoming) -> None:
    """Write the original picture with the transparency of the uploaded one, and the original's text, as PNG."""
    original = _original(folders, form.fields.get("original_ref"))
    try:
        with Image.open(mask.path) as picture:
            alpha = picture.convert("RGBA").getchannel("A")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the uploaded mask cannot be read as a picture ({error}); send a PNG") from error
    try:
        with Image.open(original) as picture:
            picture.load()
            chunks = {key: text for key, text in getattr(picture, "text", {}).items() if isinstance(text, str)}
            # The editor shows the picture the way its EXIF data says, and the mask was drawn on that.
            merged = ImageOps.exif_transpose(picture).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{original.name} cannot be read as a picture ({error}); choose another original") from error
    if merged.size != alpha.size:
        raise ValueError(f"the mask is {alpha.size} and {original.name} is {merged.size}; send a mask of that size")
    merged.putalpha(alpha)
    merged.info = {}
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    result.write(lambda file: merged.save(file, format="PNG", pnginfo=info, compress_level=4))


def _original(folders: DataFolders, reference: str | None) -> Path:
    """The file that a mask was drawn on."""
    try:
        parsed = json.loads(reference or "")
    except (ValueError, RecursionError) as error:
        raise ValueError('original_ref is not JSON; send {"filename": ..., "subfolder": ..., "type": ...}') from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("filename"), str) or not parsed["filename"]:
        raise ValueError("original_ref names no file; give it a filename")
    name, subfolder = parsed["filename"], parsed.get("subfolder") or ""
    if not isinstance(subfolder, str):
        raise ValueError("original_ref has a subfolder that is not a string; give its name")
    folder = folders.directory(parsed.get("type") or "output")
    path = safe_path(folder, "/".join(filter(None, (subfolder, "/".join(check_name(name))))))
    if not os.path.isfile(path):
        raise ValueError(f"the original {name!r} is not there; upload it first")
    return path
