"""Names that requests bring, as paths that stay inside a folder; files on their way in and out.

What users brought is shown only where its kind cannot run anything in a browser; everything else is a download.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import quote

from aiohttp import web

from ..folders import inside

DOWNLOAD = "application/octet-stream"

# Kinds that a browser may show from a user's folders. A list of its own: what the system's registry of types says
# must not decide whether a file is rendered.
SHOWN = {
    ".apng": "image/apng",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".webp": "image/webp",
    ".flac": "audio/flac",
    ".m4a": "audio/mp4",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".wav": "audio/wav",
    ".mkv": "video/x-matroska",
    ".mov": "video/quicktime",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".glb": "model/gltf-binary",
    ".json": "application/json",
    ".csv": "text/plain; charset=utf-8",
    ".log": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}

# Names that Windows takes for devices, with any ending.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ON_WINDOWS = os.name == "nt"

# What the name in a request causes, and not the state of the disk.
_MISTAKES = {errno.ENAMETOOLONG, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EILSEQ}
_CHUNK = 256 * 1024


class UnsafeName(ValueError):
    """A name that would leave its folder, or that means something else on another system."""


def check_name(name: str, *, writing: bool = False) -> list[str]:
    """The parts of a relative name (both slashes separate); UnsafeName where it is not one.

    With `writing`, and always on Windows, names that Windows reads as a drive, a stream or a device are refused.
    """
    parts = name.replace("\\", "/").split("/")
    if _CONTROL.search(name):
        raise UnsafeName(f"{name!r} holds control characters; give a name without them")
    if name[:1] in ("/", "\\") or ".." in parts:
        raise UnsafeName(f"{name!r} leads out of its folder; give a name inside it, without a leading / and ..")
    parts = [part for part in parts if part not in ("", ".")]
    if writing or _ON_WINDOWS:
        for part in parts:
            if ":" in part or part[-1] in " ." or _DEVICE.fullmatch(part.partition(".")[0].rstrip()):
                raise UnsafeName(f"{part!r} cannot be a file name on every system; give another name")
    return parts


def safe_path(folder: Path, name: str, *, writing: bool = False) -> Path:
    """The path of `name` below `folder`, links resolved; UnsafeName where a name or a link leads out of it."""
    relative = "/".join(check_name(name, writing=writing))
    try:
        return inside(folder, relative)
    except (ValueError, OSError) as error:  # a link that leads out, or characters that no file name can have
        raise UnsafeName(f"{name!r} leads out of its folder; give a name inside it") from error


def existing_file(folder: Path, name: str) -> Path | None:
    """The regular file `name` below `folder`; None where there is none or the name is unsafe."""
    try:
        path = safe_path(folder, name)
    except UnsafeName:
        return None
    return path if os.path.isfile(path) else None


def content_disposition(kind: str, name: str) -> str:
    """A header value that names a file; `kind` is "inline" or "attachment"."""
    plain = re.sub(r'[^ -~]|["\\%]', "_", name)
    exact = quote(name.encode("utf-8", "replace"), safe="")
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{exact}"


def user_file(path: Path, *, shown: dict[str, str] = SHOWN) -> web.StreamResponse:
    """A file of a user's folder: by its type where it is one of `shown`, else as a download."""
    content_type = shown.get(path.suffix.lower())
    disposition = content_disposition("attachment" if content_type is None else "inline", path.name)
    return send_file(path, content_type or DOWNLOAD, {"Content-Disposition": disposition})


def send_file(path: Path, content_type: str, headers: dict[str, str] | None = None) -> web.StreamResponse:
    """The bytes of `path`, which exists. Clients ask each time whether it changed, unless `headers` say otherwise."""
    headers = {
        "Content-Type": content_type,
        "Cache-Control": "no-cache",
        **(headers or {}),
    }
    # FileResponse would send a compressed neighbour in the file's place.
    if any(os.path.lexists(f"{path}{ending}") for ending in (".gz", ".br")):
        return web.Response(body=path.read_bytes(), headers=headers)
    return web.FileResponse(path, headers=headers)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Tell a name that the disk cannot take (ValueError) from a disk that fails (an answer with the reason)."""
    try:
        yield
    except OSError as error:
        if error.errno in _MISTAKES:
            raise ValueError(f"the file cannot be written under this name ({error.strerror}); give another") from error
        raise web.HTTPInternalServerError(text=f"The file could not be written: {error.strerror}.\n") from error


class Incoming:
    """A file while it arrives: under a temporary name that is gone at the end of the `with` block, unless placed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.path = folder / f".{uuid.uuid4().hex}.part"
        self.size = 0

    def __enter__(self) -> Incoming:
        with disk_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "xb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self.close()
        finally:
            self.path.unlink(missing_ok=True)

    async def receive(self, chunks: AsyncIterable[bytes], limit: int) -> None:
        """Write what arrives; 413 where it is more than `limit` bytes."""
        async for chunk in chunks:
            self.size += len(chunk)
            if self.size > limit:
                raise too_large(limit)
            await asyncio.to_thread(self._write, chunk)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            with disk_errors():
                self._file.close()

    def write(self, save: Callable[[BinaryIO], object]) -> None:
        """Let `save` write the file instead, and close it."""
        assert self._file is not None
        with disk_errors():
            save(self._file)
        self.close()
        self.size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            self._digest = _digest(file)

    def same_as(self, path: Path) -> bool:
        """Whether `path` is a file of the same bytes."""
        if not os.path.isfile(path) or path.stat().st_size != self.size:
            return False
        with open(path, "rb") as file:
            return _digest(file).digest() == self._digest.digest()

    def place(self, target: Path) -> None:
        """Give the closed file its name, in place of what had it; its folder is made."""
        with disk_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(self.path, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # Another disk: the copy gets its name only when it is whole.
                copy = target.with_name(self.path.name)
                try:
                    shutil.copyfile(self.path, copy)
                    os.replace(copy, target)
                finally:
                    copy.unlink(missing_ok=True)

    def _write(self, chunk: bytes) -> None:
        assert self._file is not None
        self._digest.update(chunk)
        with disk_errors():
            self._file.write(chunk)


def _digest(file: BinaryIO) -> hashlib._Hash:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest


def write_file(path: Path, content: bytes) -> None:
    """Write a small file under another name and give it its own when it is whole."""
    with disk_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def too_large(limit: int) -> web.HTTPRequestEntityTooLarge:
    return web.HTTPRequestEntityTooLarge(
        limit, text=f"The upload is larger than the {limit} bytes that this server takes.\n"
    )
