"""The embedded host: runs ComfyUI graphs where ComfyUI is not installed."""

from typing import TYPE_CHECKING, Any

from .engine import Host
from .progress import ProgressBar
from .signals import ExecutionBlocker, RunInterrupted

if TYPE_CHECKING:
    from .server.app import create_app

__all__ = ["ExecutionBlocker", "Host", "ProgressBar", "RunInterrupted", "create_app"]


def __getattr__(name: str) -> Any:
    # Only the server needs aiohttp.
    if name == "create_app":
        from .server.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
