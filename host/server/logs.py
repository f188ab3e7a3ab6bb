"""`/internal/logs`: the last lines of what this process logs and prints, and the same live to who asks for it."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, TextIO

from aiohttp import web

from .context import Server
from .hub import Hub
from .json_data import json_response, read_object

_MOST_LINES = 1000
_LONGEST_LINE = 10_000
_STREAMS = ("stdout", "stderr")
_MOST_SUBSCRIBERS = 100
# Lines are gathered this long, in seconds, so that a talkative node does not send a message for each.
_INTERVAL = 0.1

# A carriage return ends a line once it is known that no line feed follows.
_LINE_END = re.compile(r"\r\n|\n|\r(?=[^\n])")


def routes(server: Server) -> list[web.RouteDef]:
    async def text(request: web.Request) -> web.Response:
        return json_response("".join(f"{entry['t']} - {entry['m']}" for entry in request.app[LOG].entries()))

    async def raw(request: web.Request) -> web.Response:
        columns, rows = shutil.get_terminal_size()
        return json_response({"entries": request.app[LOG].entries(), "size": {"cols": columns, "rows": rows}})

    async def subscribe(request: web.Request) -> web.Response:
        body = await read_object(request)
        client, enabled = body.get("clientId"), body.get("enabled")
        if not isinstance(client, str) or not isinstance(enabled, bool):
            raise ValueError("expected clientId, a string, and enabled, true or false")
        request.app[LOG].subscribe(client, enabled)
        return web.Response(status=200)

    return [
        web.get("/internal/logs", text),
        web.get("/internal/logs/raw", raw),
        web.patch("/internal/logs/subscribe", subscribe),
    ]


def record(app: web.Application, hub: Hub) -> None:
    """Keep what is logged and printed while `app` runs, and send it to the subscribed clients of `hub`."""
    log = app[LOG] = Log(hub)

    async def recording(app: web.Application) -> AsyncIterator[None]:
        log.open(asyncio.get_running_loop())
        copies = {name: _Copy(stream, log) for name in _STREAMS if (stream := getattr(sys, name)) is not None}
        for name, copy in copies.items():
            setattr(sys, name, copy)
        handler = _Handler(log)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            for name, copy in copies.items():
                # Somebody may have put a stream of their own over ours: then ours stays below it, and only passes on.
                if getattr(sys, name) is copy:
                    setattr(sys, name, copy.stream)
            log.close()

    app.cleanup_ctx.append(recording)


class Log:
    """The last lines, oldest first. `add` may be called from any thread."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._lines: deque[dict[str, str]] = deque(maxlen=_MOST_LINES)
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers: dict[str, None] = {}
        self._unsent: deque[dict[str, str]] = deque(maxlen=_MOST_LINES)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def close(self) -> None:
        """Take no more lines."""
        self._loop = None

    def add(self, line: str) -> None:
        """Keep a line with its end; one that ends in a carriage return gives way to the next, as in a terminal."""
        entry = {"t": datetime.now().isoformat(), "m": line[-_LONGEST_LINE:]}
        with self._lock:
            loop = self._loop
            if loop is None:
                return
            if self._lines and self._lines[-1]["m"].endswith("\r"):
                self._lines.pop()
            self._lines.append(entry)
            if not self._subscribers:
                return
            first = not self._unsent
            self._unsent.append(entry)
        if first:
            try:
                loop.call_soon_threadsafe(loop.call_later, _INTERVAL, self._send)
            except RuntimeError:  # the loop has just closed
                self.close()

    def entries(self) -> list[dict[str, str]]:
        with self._lock:
            return list(self._lines)

    def subscribe(self, client: str, enabled: bool) -> None:
        with self._lock:
            self._subscribers.pop(client, None)
            if enabled:
                self._subscribers[client] = None
                # Clients that left without a word are forgotten in time.
                while len(self._subscribers) > _MOST_SUBSCRIBERS:
                    del self._subscribers[next(iter(self._subscribers))]

    def _send(self) -> None:
        with self._lock:
            data: dict[str, Any] = {"entries": list(self._unsent), "size": None}
            self._unsent.clear()
            clients = list(self._subscribers)
        for client in clients:
            self._hub.deliver("logs", data, client)


LOG = web.AppKey("log", Log)


class _Handler(logging.Handler):
    """Keeps log records; where nobody else shows them, warnings still reach the terminal, as without this handler."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            for line in self.format(record).splitlines():
                self._log.add(line + "\n")
        except Exception:
            self.handleError(record)
        # The first of our handlers, where all are ours, stands in for the one that Python uses where there is none.
        others = logging.getLogger().handlers
        last = logging.lastResort
        if last is None or record.levelno < last.level or others[:1] != [self]:
            return
        if all(isinstance(handler, _Handler) for handler in others):
            stream = sys.stderr
            while isinstance(stream, _Copy):
                stream = stream.stream
            if stream is not None:
                stream.write(last.format(record) + "\n")


class _Copy:
    """A text stream that passes everything on and keeps whole lines in a log."""

    def __init__(self, stream: TextIO, log: Log) -> None:
        self.stream = stream
        self._log = log
        self._lock = threading.RLock()
        self._begun = ""

    def write(self, text: str) -> int:
        count = self.stream.write(text)
        with self._lock:
            begun, end = self._begun + text, 0
            lines = []
            for match in _LINE_END.finditer(begun):
                lines.append(begun[end : match.end()])
                end = match.end()
            self._begun = begun[end:][-_LONGEST_LINE:]
        for line in lines:
            self._log.add(line)
        return count

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
