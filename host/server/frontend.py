"""The editor's own files: its page, scripts, fonts and pictures."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from aiohttp import web

from .context import Server
from .files import DOWNLOAD, existing_file, send_file
from .json_data import json_response

INSTALL = 'The editor is not installed; run: pip install "stable-cascade-nodes[host]"\n'

# What a browser must be told exactly; a system's registry of types may say otherwise.
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ttf": "font/ttf",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".webm": "video/webm",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
}


def frontend_routes(server: Server) -> list[web.RouteDef]:
    """Routes that come after all others: the last takes every path that is left."""

    async def page(request: web.Request) -> web.StreamResponse:
        if server.frontend is None:
            return web.Response(status=404, text=INSTALL)
        return editor_file(server, "index.html")

    # The pack's own templates are all there are; a list that is missing would make the editor complain.
    async def templates(request: web.Request) -> web.Response:
        return json_response([])

    async def logos(request: web.Request) -> web.Response:
        return json_response({})

    async def any_file(request: web.Request) -> web.StreamResponse:
        return editor_file(server, request.match_info["path"])

    return [
        web.get("/", page),
        web.get("/templates/index_logo.json", logos),
        web.get(r"/templates/index{language:(\.[\w-]+)?}.json", templates),
        web.get("/{path:.*}", any_file),
    ]


def editor_file(server: Server, name: str) -> web.StreamResponse:
    """A file of the editor; an empty 404 where there is none."""
    path = None if server.frontend is None else existing_file(server.frontend, name)
    if path is None:
        return web.Response(status=404)
    if name.startswith("assets/") and path.suffix in (".js", ".css", ".woff2"):
        # Their names change with their content.
        return static_file(path, {"Cache-Control": "public, max-age=31536000, immutable"})
    return static_file(path)


def static_file(path: Path, headers: dict[str, str] | None = None) -> web.StreamResponse:
    """A file that came with an installed package, by its type."""
    content_type = _TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0] or DOWNLOAD
    return send_file(path, content_type, headers)
