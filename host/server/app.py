"""The server as an aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from ... import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from ..core_nodes import PREVIEW_PREFIX
from ..engine import HISTORY_LENGTH, Host
from ..folders import DataFolders
from ..pack import pack_name
from . import hub, info, internal, jobs, logs, models, packs, prompts, queue, uploads, userdata, users, view
from .context import MAX_UPLOAD_SIZE, Pack, Server
from .frontend import frontend_routes
from .guard import guard
from .worker import Worker

SERVER = web.AppKey("server", Server)

_ROOT = Path(__file__).parents[2]
_ROUTES = (hub, prompts, queue, jobs, info, view, uploads, users, userdata, models, internal, logs, packs)
# How long a node may take to notice that the server stops.
_STOP_TIMEOUT = 10.0

_log = logging.getLogger(__name__)


def create_app(
    node_class_mappings: Mapping[str, Any],
    data_dir: str | os.PathLike[str],
    *,
    node_display_name_mappings: Mapping[str, str] | None = None,
    python_module: str = "custom_nodes",
    packs: Iterable[Pack] = (),
    frontend: Path | None = None,
    allowed_hosts: Iterable[str] = (),
    history_length: int = HISTORY_LENGTH,
) -> web.Application:
    """An application that answers as ComfyUI does, for V1 node classes beside the core nodes.

    Its files lie below `data_dir` (`models/`, `input/`, `output/`, `temp/`, `user/`). `python_module` is where the
    editor files the nodes (`custom_nodes.<pack>`). `frontend` is the folder of the editor's files; None serves none.
    `allowed_hosts` are names that the server may be asked under, besides localhost and any IP address. Prompts run
    one at a time in a thread of the application's own, from its start-up to its clean-up; `app[SERVER]` is its state.
    """
    clients = hub.Hub()
    host = Host(DataFolders(data_dir), clients.deliver, history_length=history_length)
    host.registry.add(node_class_mappings, node_display_name_mappings, python_module=python_module)
    server = Server(host, host.folders, clients, tuple(packs), frontend)

    app = web.Application(client_max_size=MAX_UPLOAD_SIZE)
    app[SERVER] = server
    guard(app, allowed_hosts)
    for module in _ROUTES:
        for route in module.routes(server):
            app.router.add_routes([route, web.RouteDef(route.method, f"/api{route.path}", route.handler, route.kwargs)])
    app.router.add_routes(frontend_routes(server))
    logs.record(app, clients)
    _run_with(app, server)
    return app


def cascade_app(
    data_dir: str | os.PathLike[str], *, frontend: Path | None = None, allowed_hosts: Iterable[str] = ()
) -> web.Application:
    """An application with the nodes, help pages, templates and translations of this package."""
    name = pack_name()
    return create_app(
        NODE_CLASS_MAPPINGS,
        data_dir,
        node_display_name_mappings=NODE_DISPLAY_NAME_MAPPINGS,
        python_module=f"custom_nodes.{name}",
        packs=[Pack(name, web=_ROOT / "web", templates=_ROOT / "workflows", locales=_ROOT / "locales")],
        frontend=frontend,
        allowed_hosts=allowed_hosts,
    )


def frontend_folder() -> Path | None:
    """The editor's files of the installed frontend package; None where it is not installed."""
    spec = importlib.util.find_spec("comfyui_frontend_package")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "static"
    return folder if (folder / "index.html").is_file() else None


def _run_with(app: web.Application, server: Server) -> None:
    """Start the worker and the hub with the application and stop them with it."""
    worker = Worker(server.host)

    async def start(app: web.Application) -> None:
        await asyncio.to_thread(_remove_old_previews, server.folders.temp)
        server.hub.open()
        worker.start()

    async def stop(app: web.Application) -> None:
        # The worker first, so that clients hear how their prompt ended.
        if not await asyncio.to_thread(worker.stop, _STOP_TIMEOUT):
            _log.warning("a node goes on after %d s; it is given up", _STOP_TIMEOUT)
        await server.hub.close()

    app.on_startup.append(start)
    app.on_shutdown.append(stop)


def _remove_old_previews(folder: Path) -> None:
    """Previews belong to the history of the server that made them; the folder may hold files of others."""
    for path in folder.glob(f"{PREVIEW_PREFIX}*.png"):
        with contextlib.suppress(OSError):
            path.unlink()
