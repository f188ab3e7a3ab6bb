"""A client for ComfyUI and for the embedded server: queue graphs, watch them run, fetch what they made.

`Client` is for ordinary code, `AsyncClient` for asyncio; both need aiohttp, which is imported when one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    ClientError,
    ExecutionFailed,
    JobInterrupted,
    JobLost,
    JobTimeout,
    PromptRefused,
    ServerUnreachable,
    UnexpectedAnswer,
)
from .events import (
    Event,
    Failed,
    Finished,
    Interrupted,
    NodeBlocked,
    NodeFinished,
    NodeOutput,
    NodeProgress,
    NodesCached,
    NodeStarted,
    Preview,
    Started,
)
from .results import Result, ServerFile

if TYPE_CHECKING:
    from .asynchronous import AsyncClient, AsyncJob
    from .synchronous import Client, Job

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Client",
    "ClientError",
    "Event",
    "ExecutionFailed",
    "Failed",
    "Finished",
    "Interrupted",
    "Job",
    "JobInterrupted",
    "JobLost",
    "JobTimeout",
    "NodeBlocked",
    "NodeFinished",
    "NodeOutput",
    "NodeProgress",
    "NodeStarted",
    "NodesCached",
    "Preview",
    "PromptRefused",
    "Result",
    "ServerFile",
    "ServerUnreachable",
    "Started",
    "UnexpectedAnswer",
]

_MODULES = {
    "AsyncClient": "asynchronous",
    "AsyncJob": "asynchronous",
    "Client": "synchronous",
    "Job": "synchronous",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
