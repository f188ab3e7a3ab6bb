"""The error objects of ComfyUI's API."""

from __future__ import annotations

import traceback
from typing import Any


def problem(kind: str, message: str, details: str = "", **extra_info: Any) -> dict[str, Any]:
    """One error: `kind` is what programs test, `message` and `details` are for people."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def exception_name(error: BaseException) -> str:
    """The name of an exception's class, with its module unless it is built in."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def exception_message(error: BaseException) -> str:
    """What an exception says; its class where even that fails."""
    try:
        return str(error)
    except Exception:
        return exception_name(error)


def traceback_lines(error: BaseException) -> list[str]:
    return traceback.format_tb(error.__traceback__)


def describe_problems(error: Any, node_errors: Any) -> list[str]:
    """The error objects of an answer to `POST /prompt` as texts; there is at least one."""
    found = []
    for node, entry in (node_errors if isinstance(node_errors, dict) else {}).items():
        if not isinstance(entry, dict):
            continue
        faults = entry.get("errors")
        for fault in faults if isinstance(faults, list) else ():
            found.append(f"node #{node} ({entry.get('class_type')}): {_described(fault)}")
    # The errors of the nodes say more than the one over all, which repeats some of them.
    return found or [_described(error)]


def _described(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    message, details = str(error.get("message") or "no reason given"), str(error.get("details") or "")
    if not details or details == message:
        return message
    return f"{message.rstrip('.')}: {details}"
