"""`/users` and `/settings`: one user, whose settings of the editor are one JSON file."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from ..folders import DataFolders
from .context import Server
from .files import UnsafeName, safe_path, write_file
from .json_data import json_response, read_json, read_object, to_json

_log = logging.getLogger(__name__)


def user_folder(folders: DataFolders) -> Path:
    """Where the user's settings, workflows and other files of the editor lie."""
    return folders.root / "user" / "default"


def routes(server: Server) -> list[web.RouteDef]:
    folder = user_folder(server.folders)
    settings = Settings(folder)

    async def users(request: web.Request) -> web.Response:
        # False makes the editor bring what an older one kept in the browser; so only where nothing is stored yet.
        return json_response({"storage": "server", "migrated": folder.is_dir()})

    async def all_settings(request: web.Request) -> web.Response:
        return json_response(await asyncio.to_thread(settings.read))

    async def one_setting(request: web.Request) -> web.Response:
        return json_response((await asyncio.to_thread(settings.read)).get(request.match_info["id"]))

    async def store_many(request: web.Request) -> web.Response:
        await asyncio.to_thread(settings.store, await read_object(request))
        return web.Response(status=200)

    async def store_one(request: web.Request) -> web.Response:
        await asyncio.to_thread(settings.store, {request.match_info["id"]: await read_json(request)})
        return web.Response(status=200)

    return [
        web.get("/users", users),
        web.get("/settings", all_settings),
        web.post("/settings", store_many),
        web.get("/settings/{id}", one_setting),
        web.post("/settings/{id}", store_one),
    ]


class Settings:
    """The settings file; its methods may be called from several threads at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """All settings; empty where none are stored or where the file was broken."""
        with self._lock:
            return self._read()

    def store(self, changes: dict[str, Any]) -> None:
        """Change some settings and keep the others."""
        with self._lock:
            content = to_json({**self._read(), **changes})
            write_file(self._path(), content.encode())

    def _path(self) -> Path:
        return safe_path(self._folder, "comfy.settings.json")

    def _read(self) -> dict[str, Any]:
        try:
            path = self._path()
            settings = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (UnsafeName, OSError) as error:
            _log.error("the settings cannot be read: %s; the editor starts with its own", error)
            return {}
        except (ValueError, RecursionError) as error:
            return self._set_aside(path, str(error))
        if not isinstance(settings, dict):
            return self._set_aside(path, f"expected an object and found {type(settings).__name__}")
        return settings

    def _set_aside(self, path: Path, reason: str) -> dict[str, Any]:
        number = 1
        while (kept := path.with_name(f"comfy.settings.broken-{number}.json")).exists():
            number += 1
        try:
            path.rename(kept)
        except OSError as error:
            reason, kept = f"{reason}; it could not be renamed: {error}", path
        _log.error("the settings file was broken (%s); it is kept as %s and the editor starts anew", reason, kept)
        return {}
