"""The WebSocket clients, and the way of a message from the thread that runs nodes to their sockets.

Messages cross from any thread into the event loop in the order in which they were delivered. Each client has a queue
and a task that empties it, so a client that reads slowly or not at all holds up neither the run nor other clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from .context import MAX_UPLOAD_SIZE, Server
from .json_data import to_json
from .previews import PreviewFrames, preview_frames

# What the server can do, for clients to adapt to.
FEATURES = {"supports_preview_metadata": True, "max_upload_size": MAX_UPLOAD_SIZE}

# Clients say little: their features, once.
_LARGEST_MESSAGE = 1024 * 1024
# A client this far behind gets no more previews until it has caught up, and this much further it is dropped: it
# connects again and asks for the queue and the history.
_WAITING_BEFORE_PREVIEWS_STOP = 100
_WAITING_BYTES_BEFORE_PREVIEWS_STOP = 4 * 1024 * 1024
_WAITING_BYTES_BEFORE_CLOSE = 64 * 1024 * 1024
_CLOSE_TIMEOUT = 2.0

_log = logging.getLogger(__name__)


def routes(server: Server) -> list[web.RouteDef]:
    async def connect(request: web.Request) -> web.WebSocketResponse:
        return await server.hub.connect(request, server.host.queue_length)

    return [web.get("/ws", connect)]


class Hub:
    """All connected clients. `deliver` may be called from any thread, everything else from the event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clients: dict[str, _Client] = {}
        self._connected: set[_Client] = set()
        # The client whose prompt runs, and the message that names the node; for a client that connects again.
        self._executing: tuple[str | None, str] | None = None

    def open(self) -> None:
        """Take messages from now on, for the event loop that runs."""
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Send every client away."""
        self._loop = None
        await asyncio.gather(*(client.close() for client in self._connected))

    def deliver(self, kind: str, data: dict[str, Any], client_id: str | None) -> None:
        """Send a message to one client, or to all where `client_id` is None. A `preview` holds a picture."""
        loop = self._loop
        if loop is None or (kind == "preview" and not self._has_client(client_id)):
            return
        try:
            if kind == "preview":
                loop.call_soon_threadsafe(self._send_preview, preview_frames(data), client_id)
            else:
                idle = kind == "executing" and data.get("node") is None
                text = to_json({"type": kind, "data": data})
                loop.call_soon_threadsafe(self._send_text, kind, text, client_id, idle)
        except Exception:
            # A preview that cannot be encoded, or a loop that closed meanwhile, is no reason to stop a run.
            _log.debug("a %s message was not sent", kind, exc_info=True)

    async def connect(self, request: web.Request, queue_length: Callable[[], int]) -> web.WebSocketResponse:
        """Serve one socket until it closes."""
        socket = web.WebSocketResponse(max_msg_size=_LARGEST_MESSAGE, compress=False, timeout=_CLOSE_TIMEOUT)
        await socket.prepare(request)
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        client = _Client(socket, request.transport)
        greeting = {"status": {"exec_info": {"queue_remaining": queue_length()}}, "sid": client_id}
        client.put(to_json({"type": "status", "data": greeting}))
        if self._executing is not None and self._executing[0] == client_id:
            client.put(self._executing[1])
        # The same id may come back before its old socket is known to be gone: the newest one is the client.
        self._clients[client_id] = client
        self._connected.add(client)
        writer = asyncio.create_task(client.write())
        try:
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    client.receive(message.data)
        finally:
            writer.cancel()
            self._connected.discard(client)
            if self._clients.get(client_id) is client:
                del self._clients[client_id]
            with contextlib.suppress(asyncio.CancelledError):
                await writer
        return socket

    def _has_client(self, client_id: str | None) -> bool:
        return bool(self._clients) if client_id is None else client_id in self._clients

    def _recipients(self, client_id: str | None) -> list[_Client]:
        if client_id is None:
            return list(self._clients.values())
        client = self._clients.get(client_id)
        return [] if client is None else [client]

    def _send_text(self, kind: str, text: str, client_id: str | None, idle: bool) -> None:
        if kind == "executing":
            self._executing = None if idle else (client_id, text)
        for client in self._recipients(client_id):
            client.put(text)

    def _send_preview(self, frames: PreviewFrames, client_id: str | None) -> None:
        for client in self._recipients(client_id):
            client.put_preview(frames)


class _Client:
    """One socket with its queue."""

    def __init__(self, socket: web.WebSocketResponse, transport: asyncio.Transport | None) -> None:
        self._socket = socket
        self._transport = transport
        self._waiting: asyncio.Queue[str | bytes] = asyncio.Queue()
        self._waiting_bytes = 0
        self._wants_metadata = False

    def put(self, message: str | bytes) -> None:
        if self._waiting_bytes > _WAITING_BYTES_BEFORE_CLOSE:
            self._abort()
            return
        self._waiting_bytes += len(message)
        self._waiting.put_nowait(message)

    def put_preview(self, frames: PreviewFrames) -> None:
        behind = self._waiting_bytes > _WAITING_BYTES_BEFORE_PREVIEWS_STOP
        if not behind and self._waiting.qsize() < _WAITING_BEFORE_PREVIEWS_STOP:
            self.put(frames.with_metadata if self._wants_metadata else frames.plain)

    def receive(self, text: str) -> None:
        """Take a message of the client; what is not understood is passed over."""
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(message, dict) and message.get("type") == "feature_flags":
            flags = message.get("data")
            self._wants_metadata = isinstance(flags, dict) and flags.get("supports_preview_metadata") is True
            self.put(to_json({"type": "feature_flags", "data": FEATURES}))

    async def write(self) -> None:
        """Send what is put into the queue, until cancelled or the socket is gone."""
        while True:
            message = await self._waiting.get()
            try:
                if isinstance(message, str):
                    await self._socket.send_str(message)
                else:
                    await self._socket.send_bytes(message)
            except (ConnectionError, RuntimeError):  # closing or closed; the reading side ends the client
                return
            self._waiting_bytes -= len(message)

    async def close(self) -> None:
        goodbye = self._socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server stops")
        try:
            await asyncio.wait_for(goodbye, _CLOSE_TIMEOUT)
        except Exception:  # it does not read any more
            self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
