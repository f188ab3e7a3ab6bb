"""`/models`, `/embeddings` and `/view_metadata`: what lies in the model folders."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from aiohttp import web

from ...cascade_ops.checkpoints.header import CheckpointError, read_header
from ...cascade_ops.model_folders import FORMER_NAMES, MODEL_FOLDERS, find_model, list_models
from .context import Server
from .json_data import json_response

_CURRENT_NAMES = {former: name for name, formers in FORMER_NAMES.items() for former in formers}


def routes(server: Server) -> list[web.RouteDef]:
    roots = server.folders.models

    async def folders(request: web.Request) -> web.Response:
        return json_response(list(MODEL_FOLDERS))

    async def files(request: web.Request) -> web.Response:
        folder = _folder(request)
        if folder is None:
            return web.Response(status=404)
        return json_response(await asyncio.to_thread(list_models, roots, folder))

    async def embeddings(request: web.Request) -> web.Response:
        names = await asyncio.to_thread(list_models, roots, "embeddings")
        return json_response([os.path.splitext(name)[0] for name in names])

    async def metadata(request: web.Request) -> web.Response:
        folder = _folder(request)
        found = None
        if folder is not None:
            found = await asyncio.to_thread(_metadata, roots, folder, request.query.get("filename", ""))
        return web.Response(status=404) if found is None else json_response(found)

    return [
        web.get("/models", folders),
        web.get("/models/{folder}", files),
        web.get("/embeddings", embeddings),
        web.get("/view_metadata/{folder}", metadata),
    ]


def _folder(request: web.Request) -> str | None:
    name = request.match_info["folder"]
    name = _CURRENT_NAMES.get(name, name)
    return name if name in MODEL_FOLDERS else None


def _metadata(roots: list[Path], folder: str, name: str) -> dict[str, str] | None:
    """What a safetensors file says about itself; None where there is no such file or it says nothing.

    Only names that the folder's list holds are looked at, so a request cannot name a path. Links in a model folder
    are followed, as when a model is loaded: their owner put them there.
    """
    if not name.lower().endswith((".safetensors", ".sft")) or name not in list_models(roots, folder):
        return None
    try:
        return read_header(Path(find_model(roots, folder, name))).metadata or None
    except (CheckpointError, OSError, ValueError):
        return None
