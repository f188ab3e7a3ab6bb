"""Requests to a ComfyUI server, with errors that say what was found."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from .errors import ServerUnreachable, UnexpectedAnswer

# A connection that fails, and an address that is none.
UNREACHABLE = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


class Requests:
    """One HTTP session with the server at `address`; each request may take `timeout` seconds without any progress."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address = address
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        # Made late: aiohttp wants a running loop.
        if self._session is None:
            limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout)
            self._session = aiohttp.ClientSession(timeout=limits)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def json(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of an answer with status 200."""
        status, body = await self.answer(method, path, **options)
        if status != 200:
            raise self.unexpected(method, path, status, body)
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise self.unexpected(method, path, status, body) from None

    async def json_object(self, path: str) -> dict[str, Any]:
        """The JSON object that `GET path` gives."""
        found = await self.json("GET", path)
        if not isinstance(found, dict):
            raise self.unexpected("GET", path, 200, json.dumps(found).encode())
        return found

    async def answer(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        """Status and body."""
        async with self.open(method, path, **options) as response:
            return response.status, await response.read()

    @asynccontextmanager
    async def open(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer of which the body is still to be read; connections that break inside the block are reported too."""
        try:
            async with self.session().request(method, self.address + path, **options) as response:
                yield response
        except UNREACHABLE as error:
            raise self.unreachable(error) from error

    def unreachable(self, error: BaseException) -> ServerUnreachable:
        reason = str(error).strip() or "it did not answer in time"
        return ServerUnreachable(
            f"{self.address} cannot be reached ({reason}); check the address and that the server is running"
        )

    def unexpected(self, method: str, path: str, status: int, body: bytes) -> UnexpectedAnswer:
        said = body.decode("utf-8", "replace").strip()
        # A page of HTML says nothing to a person at a terminal.
        said = "" if said.startswith("<") or not said else f" ({said[:200]})"
        advice = "its log says more" if status >= 500 else "check that this is the address of a ComfyUI server"
        return UnexpectedAnswer(f"{self.address} answered {method} {path} with status {status}{said}; {advice}", status)
