"""`/internal`: lists of the data folders' files and of the model folders, for the editor's panels."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from aiohttp import web

from ...cascade_ops.model_folders import FORMER_NAMES, MODEL_FOLDERS
from .context import Server
from .files import existing_file
from .json_data import json_response


def routes(server: Server) -> list[web.RouteDef]:
    async def files(request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        if kind not in ("input", "output", "temp"):
            return json_response({"error": "Invalid directory type"}, status=400)
        return json_response(await asyncio.to_thread(_newest_first, server.folders.directory(kind)))

    async def folder_paths(request: web.Request) -> web.Response:
        roots = server.folders.models
        return json_response(
            {
                folder: [str(root / name) for root in roots for name in (folder, *FORMER_NAMES.get(folder, ()))]
                for folder in MODEL_FOLDERS
            }
        )

    return [web.get("/internal/files/{kind}", files), web.get("/internal/folder_paths", folder_paths)]


def _newest_first(folder: Path) -> list[str]:
    """The files of a folder, without hidden ones and links that lead out of it."""
    if not folder.is_dir():
        return []
    times = {}
    for name in sorted(os.listdir(folder)):
        path = None if name.startswith(".") else existing_file(folder, name)
        if path is not None:
            times[name] = path.stat().st_mtime_ns
    return sorted(times, key=lambda name: -times[name])
