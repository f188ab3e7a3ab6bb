"""`/object_info`, `/system_stats` and `/features`: what the server is and can do."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import sys
from typing import Any

from aiohttp import web

from ..memory import machine_memory
from .context import Server
from .hub import FEATURES
from .json_data import json_response

# The ComfyUI whose answers this server gives.
COMFYUI_VERSION = "0.3.64"
FRONTEND_PACKAGE = "comfyui-frontend-package"


def routes(server: Server) -> list[web.RouteDef]:
    host = server.host

    async def all_nodes(request: web.Request) -> web.Response:
        # Nodes list model folders when they are asked for their inputs.
        return json_response(await asyncio.to_thread(host.object_info))

    async def one_node(request: web.Request) -> web.Response:
        return json_response(await asyncio.to_thread(host.object_info, request.match_info["node_class"]))

    async def stats(request: web.Request) -> web.Response:
        return json_response(await asyncio.to_thread(system_stats))

    async def features(request: web.Request) -> web.Response:
        return json_response(FEATURES)

    return [
        web.get("/object_info", all_nodes),
        web.get("/object_info/{node_class}", one_node),
        web.get("/system_stats", stats),
        web.get("/features", features),
    ]


def system_stats() -> dict[str, Any]:
    """The machine, in bytes; and what the editor decides by: its own version and how the server was started."""
    import torch

    total, free = machine_memory()
    system = {
        "os": os.name if sys.platform == "win32" else sys.platform,
        "ram_total": total,
        "ram_free": free,
        "comfyui_version": COMFYUI_VERSION,
        "python_version": sys.version,
        "pytorch_version": torch.__version__,
        "embedded_python": False,
        # The editor asks no server on the internet where it finds this option.
        "argv": ["cascade", "serve", "--disable-api-nodes"],
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # What is installed is what is required: the editor would warn of any other version.
        system["required_frontend_version"] = importlib.metadata.version(FRONTEND_PACKAGE)
    return {"system": system, "devices": _devices(total, free)}


def _devices(ram_total: int, ram_free: int) -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        memory = {"vram_total": ram_total, "vram_free": ram_free}
        memory |= {"torch_vram_total": ram_total, "torch_vram_free": ram_free}
        return [{"name": "cpu", "type": "cpu", "index": None, **memory}]
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        reserved = torch.cuda.memory_reserved(index)
        unused = reserved - torch.cuda.memory_allocated(index)
        devices.append(
            {
                "name": f"cuda:{index} {torch.cuda.get_device_name(index)}",
                "type": "cuda",
                "index": index,
                "vram_total": total,
                "vram_free": free + unused,
                "torch_vram_total": reserved,
                "torch_vram_free": unused,
            }
        )
    return devices
