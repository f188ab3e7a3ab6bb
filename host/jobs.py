"""Prompts on their way through the queue, and what the `/jobs` routes of newer editors say of them.

The shape of a job was observed on ComfyUI 0.10: what is not known (yet) is left out, times are milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PENDING, IN_PROGRESS = "pending", "in_progress"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
STATUSES = (PENDING, IN_PROGRESS, COMPLETED, FAILED, CANCELLED)

# Kinds of output that an editor can show as the picture of a job.
_MEDIA = ("images", "video", "audio", "3d")
_ENDINGS = {
    "execution_success": COMPLETED,
    "execution_error": FAILED,
    "execution_interrupted": CANCELLED,
}


@dataclass(order=True)
class Job:
    """A prompt that passed validation; jobs run in the order of their numbers."""

    number: float
    order: int
    prompt_id: str = field(compare=False)
    prompt: dict[str, Any] = field(compare=False)
    extra_data: dict[str, Any] = field(compare=False)
    outputs: list[str] = field(compare=False)

    def as_list(self) -> list[Any]:
        """The form in which the older routes show a prompt."""
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]

    def summary(self, status: str) -> dict[str, Any]:
        """The job as an entry of `/jobs` while it waits or runs."""
        summary = {
            "id": self.prompt_id,
            "status": status,
            "priority": self.number,
            "create_time": self.extra_data["create_time"],
            "outputs_count": 0,
        }
        workflow_id = _workflow_id(self.extra_data)
        return summary if workflow_id is None else {**summary, "workflow_id": workflow_id}

    def summary_of(self, result: dict[str, Any]) -> dict[str, Any]:
        """The job as an entry of `/jobs` after it ended; `result` is what its history entry says of the run."""
        messages = result["status"]["messages"]
        times = {kind: data["timestamp"] for kind, data in messages}
        last, data = messages[-1] if messages else ("execution_error", {})
        summary = self.summary(_ENDINGS.get(last, FAILED))
        if "execution_start" in times:
            summary["execution_start_time"] = times["execution_start"]
        if last in _ENDINGS and last in times:
            summary["execution_end_time"] = times[last]
        if summary["status"] == FAILED and data:
            summary["execution_error"] = data
        files = list(_files(result["outputs"]))
        summary["outputs_count"] = len(files)
        shown = [file for file in files if file["mediaType"] in _MEDIA]
        if shown:
            # What was kept tells more than what was only shown.
            summary["preview_output"] = next((file for file in shown if file.get("type") == "output"), shown[0])
        return summary


def _files(outputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The files that a run's nodes named, each with its node and kind."""
    for node_id, shown in outputs.items():
        for kind, items in shown.items():
            for item in items if isinstance(items, (list, tuple)) else ():
                if isinstance(item, dict):
                    yield {**item, "nodeId": node_id, "mediaType": kind}


def _workflow_id(extra_data: dict[str, Any]) -> str | None:
    """The id of the editor's workflow that a prompt was made from, where it says so."""
    found: Any = extra_data
    for key in ("extra_pnginfo", "workflow", "id"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None
