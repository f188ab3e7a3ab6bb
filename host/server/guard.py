"""What stands between the network and the handlers: who may ask, and what a mistake is answered.

A server on this machine can be reached by every page that a browser on it shows. So requests that another site's page
makes are refused (their `Origin` is foreign), and so are those under a name that is not the server's (a name that
somebody else points at this machine would make a foreign page the server's own: DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

from aiohttp import web

from ..problems import problem
from .json_data import json_response

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PORTS = {"http": 80, "https": 443}

_log = logging.getLogger(__name__)


def guard(app: web.Application, allowed_hosts: Iterable[str] = ()) -> None:
    """Protect `app`. `allowed_hosts` are names that it may be asked under besides localhost and any address."""
    names = frozenset(name.lower().rstrip(".") for name in allowed_hosts)

    @web.middleware
    async def check_sender(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "")
        if not is_own_host(host, names):
            return web.Response(
                status=403,
                text=f"This server is not known as {host!r}; open it as localhost or by its address, "
                "or start it with --allow-host and that name.\n",
            )
        if is_foreign(request, host):
            return web.Response(status=403)
        return await handler(request)

    app.middlewares.append(check_sender)
    app.middlewares.append(_answer_mistakes)
    app.on_response_prepare.append(_forbid_sniffing)


def is_own_host(host: str, names: frozenset[str]) -> bool:
    """Whether a `Host` header names this server: localhost, any IP address, or one of `names`."""
    name = _split(f"//{host}")[0]
    if name is None or "@" in host:
        return False
    if name == "localhost" or name.endswith(".localhost") or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_foreign(request: web.Request, host: str) -> bool:
    """Whether a page of another site makes this request."""
    origin = request.headers.get("Origin")
    if origin is not None:
        scheme = origin.partition(":")[0]
        default = _PORTS.get(scheme)
        name, port = _split(origin)
        own_name, own_port = _split(f"//{host}")
        return (name, port or default) != (own_name, own_port or default)
    if request.headers.get("Sec-Fetch-Site") != "cross-site":
        return False
    # A link on another site may lead here: opening a page reads nothing back and changes nothing.
    opens_page = request.headers.get("Sec-Fetch-Dest") == "document" and request.method in ("GET", "HEAD")
    return not opens_page


def _split(url: str) -> tuple[str | None, int | None]:
    """The host and port of a URL; the host is None where there is none."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None, None
    return (name.rstrip(".") or None if name else None), port


@web.middleware
async def _answer_mistakes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what a handler refuses as a ValueError with status 400, in the form of a refused prompt."""
    try:
        return await handler(request)
    except (ValueError, RecursionError) as error:
        _log.debug("%s %s was refused", request.method, request.path, exc_info=True)
        answer = {"error": problem("invalid_request", str(error)), "node_errors": {}}
        return json_response(answer, status=400)


async def _forbid_sniffing(request: web.Request, response: web.StreamResponse) -> None:
    # Files that users brought are what their type says, and nothing that a browser makes of their content.
    response.headers["X-Content-Type-Options"] = "nosniff"
