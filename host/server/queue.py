"""`/queue` and `/history`: what waits and what came of it, as older editors and scripts ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from .context import Server
from .guard import Handler
from .json_data import id_list, json_response, read_object


def routes(server: Server) -> list[web.RouteDef]:
    host = server.host

    async def queue(request: web.Request) -> web.Response:
        running, pending = host.queue()
        return json_response(
            {"queue_running": [job.as_list() for job in running], "queue_pending": [job.as_list() for job in pending]}
        )

    async def history(request: web.Request) -> web.Response:
        return json_response(history_page(host.history(), whole(request, "max_items"), whole(request, "offset")))

    async def history_entry(request: web.Request) -> web.Response:
        return json_response(host.history(request.match_info["prompt_id"]))

    return [
        web.get("/queue", queue),
        web.post("/queue", removing(host.remove_pending)),
        web.get("/history", history),
        web.get("/history/{prompt_id}", history_entry),
        web.post("/history", removing(host.forget)),
    ]


def history_page(entries: dict[str, Any], max_items: int | None, offset: int | None) -> dict[str, Any]:
    """`max_items` entries from the `offset`-th oldest one on; without an offset (or below 0), the newest ones."""
    names = list(entries)
    if max_items is not None:
        max_items = max(max_items, 0)
    if offset is None or offset < 0:
        offset = 0 if max_items is None else max(len(names) - max_items, 0)
    end = None if max_items is None else offset + max_items
    return {name: entries[name] for name in names[offset:end]}


def whole(request: web.Request, name: str) -> int | None:
    """A whole number of the query, None where it is missing."""
    value = request.query.get(name)
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} is {value[:50]!r}; expected a whole number") from None


def removing(remove: Callable[..., object]) -> Handler:
    """A handler of `{"clear": true}` and `{"delete": [ids]}`; `remove` takes one id, or none for all."""

    async def handler(request: web.Request) -> web.Response:
        body = await read_object(request)
        if body.get("clear"):
            remove()
        for prompt_id in id_list(body, "delete"):
            remove(prompt_id)
        return web.Response()

    return handler
