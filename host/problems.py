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


def traceback_lines(error: BaseException) -> list[str]:
    return traceback.format_tb(error.__traceback__)
