"""`/prompt`, `/interrupt` and `/free`."""

from __future__ import annotations

import asyncio
import json

from aiohttp import web

from .context import Server
from .json_data import json_response, read_json, read_object


def routes(server: Server) -> list[web.RouteDef]:
    host = server.host

    async def queue_length(request: web.Request) -> web.Response:
        return json_response({"exec_info": {"queue_remaining": host.queue_length()}})

    async def submit(request: web.Request) -> web.Response:
        body = await read_json(request)
        # Validation asks the nodes, which may list folders and read files.
        status, answer = await asyncio.to_thread(host.submit, body)
        return json_response(answer, status)

    async def interrupt(request: web.Request) -> web.Response:
        """Stop the running prompt, or only the one that the body names; scripts send bodies of any kind or none."""
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            body = None
        prompt_id = body.get("prompt_id") if isinstance(body, dict) else None
        host.interrupt(None if prompt_id is None else str(prompt_id))
        return web.Response()

    async def free(request: web.Request) -> web.Response:
        """Models live in the outputs that are kept for the next prompt, so both wishes mean to forget those."""
        body = await read_object(request)
        if body.get("unload_models") or body.get("free_memory"):
            host.free()
        return web.Response()

    return [
        web.get("/prompt", queue_length),
        web.post("/prompt", submit),
        web.post("/interrupt", interrupt),
        web.post("/free", free),
    ]
