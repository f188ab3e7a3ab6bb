"""`cascade serve`: the graph editor in a browser, and ComfyUI's API, on this machine."""

from __future__ import annotations

import argparse
import asyncio
import errno
import importlib.util
import logging
import os
import signal
import sys
import threading
import urllib.parse
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import web

OK, FAILED = 0, 1
TEMPLATE = "text_to_image"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the command with the command line's parser."""
    parser = commands.add_parser(
        "serve",
        help="open the graph editor in a browser",
        description="Serve ComfyUI's graph editor and API with the Cascade nodes, without ComfyUI.",
    )
    parser.set_defaults(command=serve)
    parser.add_argument("--port", type=int, default=8188, help="0 takes a free one (default: 8188)")
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="ADDR",
        help="0.0.0.0 lets other machines in; there is no password (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--allow-host",
        dest="allowed_hosts",
        action="append",
        default=[],
        metavar="NAME",
        help="a name besides localhost and IP addresses that the server may be opened under",
    )
    parser.add_argument(
        "--data", type=Path, default=Path(), metavar="DIR", help="holds models/, input/, output/ and user/"
    )
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="open no browser")


def serve(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit code."""
    missing = [
        package
        for module, package in (("aiohttp", "aiohttp"), ("comfyui_frontend_package", "comfyui-frontend-package"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        return _refuse(f'serve needs {" and ".join(missing)}; pip install "stable-cascade-nodes[host]"')
    from .server.app import cascade_app, frontend_folder

    frontend = frontend_folder()
    if frontend is None:
        return _refuse("comfyui-frontend-package is installed without its files; pip install --force-reinstall it")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = [*arguments.allowed_hosts, arguments.listen]
    app = cascade_app(arguments.data, frontend=frontend, allowed_hosts=names)
    return asyncio.run(_serve(app, arguments))


async def _serve(app: web.Application, arguments: argparse.Namespace) -> int:
    from aiohttp import web

    stopped = asyncio.Event()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, arguments.listen, arguments.port).start()
        except (OSError, OverflowError) as error:
            return _refuse(_why_not_listening(error, arguments))
        with _stopping(stopped):
            url = _url(arguments.listen, runner.addresses[0][1])
            print(f"The editor is at {url} (Ctrl-C stops the server)", flush=True)
            if arguments.listen not in _LOOPBACK:
                print("Everybody who can reach this machine can use the server; it asks for no password.", flush=True)
            if arguments.browser:
                _open_browser(url)
            await stopped.wait()
            print("stopping", flush=True)
    finally:
        await runner.cleanup()
    return OK


@contextmanager
def _stopping(stopped: asyncio.Event) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM inside the block set an event; a second one ends the program at once."""
    loop = asyncio.get_running_loop()

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.default_int_handler)
        loop.call_soon_threadsafe(stopped.set)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _url(address: str, port: int) -> str:
    """Where the editor opens, with the text-to-image workflow in it."""
    from .pack import pack_name

    if address in ("0.0.0.0", "::", ""):
        address = "127.0.0.1"
    if ":" in address:
        address = f"[{address}]"
    query = urllib.parse.urlencode({"template": TEMPLATE, "source": pack_name()})
    return f"http://{address}:{port}/?{query}"


def _open_browser(url: str) -> None:
    """Open `url` where there is a graphical browser; a text browser would take the terminal over."""
    has_screen = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    if has_screen:
        # Some browsers return only when they are closed.
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _why_not_listening(error: OSError | OverflowError, arguments: argparse.Namespace) -> str:
    place = f"{arguments.listen} port {arguments.port}"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"{place} is in use; stop what listens there (ComfyUI?) or give another --port"
    return f"cannot listen on {place} ({error}); give another --listen or --port"


def _refuse(message: str) -> int:
    print(f"cascade: {message}", file=sys.stderr)
    return FAILED
