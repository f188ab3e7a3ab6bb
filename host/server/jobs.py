"""`/jobs`: all prompts, waiting, running and past, as newer editors ask."""

from __future__ import annotations

import uuid
from typing import Any

from aiohttp import web

from ..jobs import CANCELLED, COMPLETED, FAILED, STATUSES
from .context import Server
from .json_data import json_response, read_json

_ENDED = (COMPLETED, FAILED, CANCELLED)


def routes(server: Server) -> list[web.RouteDef]:
    host = server.host

    async def jobs(request: web.Request) -> web.Response:
        try:
            page = jobs_page(host.jobs(), request.query)
        except ValueError as error:
            return json_response({"error": str(error)}, 400)
        return json_response(page)

    async def job(request: web.Request) -> web.Response:
        job_id = request.match_info["job_id"]
        summary = next((item for item in host.jobs() if item["id"] == job_id), None)
        if summary is None:
            return json_response({"error": "Job not found"}, 404)
        if summary["status"] in _ENDED:
            for entry in host.history(job_id).values():
                summary = {**summary, **_details(entry)}
        return json_response(summary)

    async def cancel(request: web.Request) -> web.Response:
        return json_response({"cancelled": host.cancel(request.match_info["job_id"])})

    async def cancel_several(request: web.Request) -> web.Response:
        body = await read_json(request)
        job_ids = body.get("job_ids") if isinstance(body, dict) else None
        if not isinstance(job_ids, list) or not job_ids:
            return json_response({"error": "job_ids must be a list of job ids"}, 400)
        known = {item["id"] for item in host.jobs()}
        invalid = [job_id for job_id in job_ids if not _is_job_id(job_id, known)]
        if invalid:
            return json_response({"error": "job_ids holds what is no job id", "invalid_ids": invalid}, 400)
        cancelled = [job_id for job_id in job_ids if host.cancel(job_id)]
        return json_response({"cancelled": bool(cancelled)})

    return [
        web.get("/jobs", jobs),
        web.get("/jobs/{job_id}", job),
        web.post("/jobs/{job_id}/cancel", cancel),
        web.post("/jobs/cancel", cancel_several),
    ]


def jobs_page(jobs: list[dict[str, Any]], query: Any) -> dict[str, Any]:
    """The jobs that a query asks for: filtered, sorted (newest first), and of those a page."""
    statuses = [status.strip() for status in query.get("status", "").split(",") if status.strip()]
    unknown = [status for status in statuses if status not in STATUSES]
    if unknown:
        raise ValueError(f"Invalid status value(s): {', '.join(unknown)}. Valid values: {', '.join(STATUSES)}")
    sort_by = query.get("sort_by", "created_at")
    if sort_by not in ("created_at", "execution_duration"):
        raise ValueError("sort_by must be 'created_at' or 'execution_duration'")
    sort_order = query.get("sort_order", "desc")
    if sort_order not in ("asc", "desc"):
        raise ValueError("sort_order must be 'asc' or 'desc'")
    limit = _integer(query, "limit")
    if limit is not None and limit <= 0:
        raise ValueError("limit must be a positive integer")
    offset = max(_integer(query, "offset") or 0, 0)
    workflow_id = query.get("workflow_id")

    chosen = [
        job
        for job in jobs
        if (not statuses or job["status"] in statuses) and (not workflow_id or job.get("workflow_id") == workflow_id)
    ]
    chosen.sort(key=_duration if sort_by == "execution_duration" else _creation, reverse=sort_order == "desc")
    end = None if limit is None else offset + limit
    return {
        "jobs": chosen[offset:end],
        "pagination": {
            "offset": offset,
            "limit": limit,
            "total": len(chosen),
            "has_more": end is not None and end < len(chosen),
        },
    }


def _details(entry: dict[str, Any]) -> dict[str, Any]:
    """What a single past job has besides its summary."""
    _, _, prompt, extra_data, _ = entry["prompt"]
    return {
        "outputs": entry["outputs"],
        "execution_status": entry["status"],
        "workflow": {"prompt": prompt, "extra_data": extra_data},
    }


def _creation(job: dict[str, Any]) -> tuple[float, float]:
    return job["create_time"], job["priority"]


def _duration(job: dict[str, Any]) -> float:
    return job.get("execution_end_time", 0) - job.get("execution_start_time", 0)


def _integer(query: Any, name: str) -> int | None:
    try:
        return int(query[name]) if query.get(name) else None
    except ValueError:
        raise ValueError(f"{name} must be an integer") from None


def _is_job_id(value: Any, known: set[str]) -> bool:
    """Whether this may name a job: one that is there, or an id as the server makes them."""
    if not isinstance(value, str):
        return False
    try:
        uuid.UUID(value)
    except ValueError:
        return value in known
    return True
