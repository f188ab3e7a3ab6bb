"""`/userdata`: the editor's files of the user, such as saved workflows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from . import context
from .context import Server
from .files import SHOWN, Incoming, UnsafeName, check_name, disk_errors, existing_file, safe_path, user_file
from .json_data import json_response
from .users import user_folder

# The editor loads a style sheet of the user's from here; a style sheet runs nothing.
_SHOWN = {**SHOWN, ".css": "text/css"}
_CHUNK = 256 * 1024


def routes(server: Server) -> list[web.RouteDef]:
    root = user_folder(server.folders)

    async def listing(request: web.Request) -> web.Response:
        name = request.query.get("dir", "")
        if not name:
            return web.Response(status=400, text="Directory not provided")
        try:
            folder = safe_path(root, name)
        except UnsafeName:
            return web.Response(status=403, text="Invalid directory")
        if not os.path.isdir(folder):
            return web.Response(status=404, text="Directory not found")
        files = await asyncio.to_thread(lambda: list(_files(root, folder, recurse=_is_on(request, "recurse"))))
        if _is_on(request, "full_info"):
            return json_response([_info(path, path.relative_to(folder)) for path in files if path.exists()])
        names = [path.relative_to(folder) for path in files]
        if _is_on(request, "split"):
            return json_response([[name.as_posix(), *name.parts] for name in names])
        return json_response([name.as_posix() for name in names])

    async def tree(request: web.Request) -> web.Response:
        try:
            folder = safe_path(root, request.query.get("path", ""))
        except UnsafeName:
            return web.Response(status=400, text="Invalid path requested")
        if not os.path.exists(folder) and folder != Path(os.path.realpath(root)):
            return web.Response(status=404, text="Requested path not found")
        if os.path.exists(folder) and not os.path.isdir(folder):
            return web.Response(status=400, text="Requested path is not a directory")
        return json_response(await asyncio.to_thread(_tree, root, folder))

    async def read(request: web.Request) -> web.StreamResponse:
        path = existing_file(root, _checked(request.match_info["file"]))
        return web.Response(status=404) if path is None else user_file(path, shown=_SHOWN)

    async def write(request: web.Request) -> web.Response:
        path = _target(root, request.match_info["file"])
        if (request.content_length or 0) > context.MAX_UPLOAD_SIZE:
            raise web.HTTPRequestEntityTooLarge(context.MAX_UPLOAD_SIZE)
        with Incoming(server.folders.temp) as incoming:
            await incoming.receive(request.content.iter_chunked(_CHUNK), context.MAX_UPLOAD_SIZE)
            # From the look at the name to the file's place nothing else runs: of two that keep a file, one wins.
            if _keeps(request) and os.path.exists(path):
                return web.Response(status=409, text="File already exists")
            incoming.place(path)
        return _answer(request, root, path)

    async def delete(request: web.Request) -> web.Response:
        path = existing_file(root, _checked(request.match_info["file"]))
        if path is None:
            return web.Response(status=404)
        with disk_errors():
            path.unlink(missing_ok=True)
        return web.Response(status=204)

    async def move(request: web.Request) -> web.Response:
        source = existing_file(root, _checked(request.match_info["file"]))
        if source is None:
            return web.Response(status=404)
        target = _target(root, request.match_info["dest"])
        if _keeps(request) and os.path.exists(target):
            return web.Response(status=409, text="File already exists")
        with disk_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        return _answer(request, root, target)

    return [
        web.get("/userdata", listing),
        web.get("/v2/userdata", tree),
        web.get("/userdata/{file}", read),
        web.post("/userdata/{file}", write),
        web.delete("/userdata/{file}", delete),
        web.post("/userdata/{file}/move/{dest}", move),
    ]


def _is_on(request: web.Request, key: str) -> bool:
    return request.query.get(key, "").lower() == "true"


def _keeps(request: web.Request) -> bool:
    """Whether a file that is there must stay as it is."""
    return request.query.get("overwrite", "").lower() == "false"


def _checked(name: str) -> str:
    """`name`, or 403 where it leads out."""
    try:
        check_name(name)
    except UnsafeName as error:
        raise web.HTTPForbidden(text=f"{error}\n") from error
    return name


def _target(root: Path, name: str) -> Path:
    """Where a file of this name is written; 403 where that is outside, 400 where it names a folder."""
    try:
        parts = check_name(name, writing=True)
        path = safe_path(root, name, writing=True)
    except UnsafeName as error:
        raise web.HTTPForbidden(text=f"{error}\n") from error
    if not parts or name.endswith(("/", "\\")) or os.path.isdir(path):
        raise web.HTTPBadRequest(text=f"{name!r} is a folder; give the name of a file.\n")
    return path


def _files(root: Path, folder: Path, *, recurse: bool) -> Iterator[Path]:
    """The files below a folder, sorted, without hidden ones and links that lead out of `root`."""
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if recurse and not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and existing_file(root, _relative(root, path)) is not None:
                yield path


def _tree(root: Path, folder: Path) -> list[dict[str, Any]]:
    """Everything below a folder: folders, then files, each sorted by name."""
    entries = []
    for directory, subfolders, names in os.walk(folder):
        for name in subfolders:
            path = Path(directory, name)
            if not path.is_symlink():
                entries.append({"name": name, "path": _relative(root, path), "type": "directory"})
        for name in names:
            relative = _relative(root, Path(directory, name))
            path = existing_file(root, relative)
            if path is not None:
                state = path.stat()
                about = {"size": state.st_size, "modified": state.st_mtime}
                entries.append({"name": name, "path": relative, "type": "file", **about})
    return sorted(entries, key=lambda entry: (entry["type"], entry["name"], entry["path"]))


def _answer(request: web.Request, root: Path, path: Path) -> web.Response:
    relative = Path(_relative(root, path))
    return json_response(_info(path, relative) if _is_on(request, "full_info") else relative.as_posix())


def _info(path: Path, name: Path) -> dict[str, Any]:
    state = path.stat()
    return {"path": name.as_posix(), "size": state.st_size, "modified": state.st_mtime, "created": state.st_ctime}


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(os.path.realpath(root)).as_posix()
