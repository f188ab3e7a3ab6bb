"""What node packs bring for the editor: scripts, help pages, workflow templates and translations."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import web

from .context import Pack, Server
from .files import existing_file
from .frontend import editor_file, static_file
from .json_data import json_response

# Each file of a language goes under its own key, except the first.
_LOCALE_FILES = {
    "main.json": None,
    "nodeDefs.json": "nodeDefs",
    "commands.json": "commands",
    "settings.json": "settings",
}

_log = logging.getLogger(__name__)


def routes(server: Server) -> list[web.RouteDef]:
    packs = {pack.name: pack for pack in server.packs}

    async def extensions(request: web.Request) -> web.Response:
        return json_response([path for pack in server.packs for path in _scripts(pack)])

    async def extension_file(request: web.Request) -> web.StreamResponse:
        name, path = request.match_info["pack"], request.match_info["path"]
        if name not in packs:
            # The editor's own extensions lie under the same address.
            return editor_file(server, f"extensions/{name}/{path}")
        return _file(packs[name].web, path)

    async def templates(request: web.Request) -> web.Response:
        listed = {pack.name: _templates(pack) for pack in server.packs}
        return json_response({name: found for name, found in listed.items() if found})

    async def template_file(request: web.Request) -> web.StreamResponse:
        pack, name = packs.get(request.match_info["pack"]), request.match_info["name"]
        # The folder may hold more than templates; only what the list names, and its picture, is served.
        stem, ending = os.path.splitext(name)
        if pack is None or ending not in (".json", ".jpg") or stem not in _templates(pack):
            return web.Response(status=404)
        return _file(pack.templates, name)

    async def translations(request: web.Request) -> web.Response:
        return json_response(await asyncio.to_thread(_translations, server.packs))

    async def subgraphs(request: web.Request) -> web.Response:
        return json_response({})

    return [
        web.get("/extensions", extensions),
        web.get("/extensions/{pack}/{path:.+}", extension_file),
        web.get("/workflow_templates", templates),
        web.get("/workflow_templates/{pack}/{name}", template_file),
        web.get("/i18n", translations),
        web.get("/global_subgraphs", subgraphs),
    ]


def _file(folder: Path | None, name: str) -> web.StreamResponse:
    path = None if folder is None else existing_file(folder, name)
    return web.Response(status=404) if path is None else static_file(path)


def _scripts(pack: Pack) -> list[str]:
    """Addresses of the scripts that the editor loads: every .js file below the pack's web folder."""
    if pack.web is None:
        return []
    names = sorted(path.relative_to(pack.web).as_posix() for path in pack.web.rglob("*.js") if path.is_file())
    return [quote(f"/extensions/{pack.name}/{name}") for name in names]


def _templates(pack: Pack) -> list[str]:
    """Names of a pack's workflows: the .json files that lie directly in its folder."""
    if pack.templates is None or not pack.templates.is_dir():
        return []
    return sorted(path.stem for path in pack.templates.glob("*.json") if path.is_file())


def _translations(packs: tuple[Pack, ...]) -> dict[str, Any]:
    """Language -> texts, of all packs together; where two say something of the same, the later one holds."""
    merged: dict[str, Any] = {}
    for pack in packs:
        if pack.locales is None or not pack.locales.is_dir():
            continue
        for language in sorted(path for path in pack.locales.iterdir() if path.is_dir()):
            for name, key in _LOCALE_FILES.items():
                texts = _texts(language / name)
                if texts:
                    _merge(merged.setdefault(language.name, {}), texts if key is None else {key: texts})
    return merged


def _texts(path: Path) -> dict[str, Any]:
    try:
        texts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("the translation %s is left out: %s", path, error)
        return {}
    if not isinstance(texts, dict):
        _log.warning("the translation %s is left out: it is no JSON object", path)
        return {}
    return texts


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
