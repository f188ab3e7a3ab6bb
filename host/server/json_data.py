"""JSON in and out of the server."""

from __future__ import annotations

import json
import math
from typing import Any

from aiohttp import web

_DEEPEST = 100


def to_json(value: Any) -> str:
    """`value` as JSON that every client can read.

    Nodes may hand out what JSON has no form for: numbers that are not finite become null, other objects text.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(_plain(value, 0))


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(text=to_json(value), status=status, content_type="application/json")


async def read_json(request: web.Request) -> Any:
    """The body of a request; ValueError where it is not JSON, whatever its content type says."""
    body = await request.read()
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request's body is not JSON: {error}") from error


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body of a request that must be a JSON object."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise ValueError(f"the request's body is {type(body).__name__}; expected a JSON object")
    return body


def id_list(body: dict[str, Any], key: str) -> list[str]:
    """The list of ids under `key`, empty where it is missing."""
    ids = body.get(key) or []
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise ValueError(f"{key} must be a list of ids; each of them a string")
    return ids


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth < _DEEPEST:
        if isinstance(value, dict):
            return {str(key): _plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [_plain(item, depth + 1) for item in value]
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"
