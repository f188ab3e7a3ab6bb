"""The WebSocket messages of a server as events of a job.

Binary frames, big endian: `u32 event`, then for event 1 `u32 type (1 JPEG, 2 PNG)` and the picture, for event 4
`u32 length`, as many bytes of JSON and the picture.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

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
from .results import Result

_PICTURE_TYPES = {1: "image/jpeg", 2: "image/png"}


class PreviewFrame(NamedTuple):
    """A picture of a running job; the ids are None where the server did not send them."""

    prompt_id: str | None
    node: str | None
    mime: str
    image: bytes


def read_preview(frame: bytes) -> PreviewFrame | None:
    """The preview in a binary frame; None for frames of other kinds and damaged ones."""
    try:
        event, number = struct.unpack_from(">II", frame)
        if event == 1:
            return PreviewFrame(None, None, _PICTURE_TYPES[number], frame[8:])
        if event != 4 or len(frame) < 8 + number:
            return None
        data = json.loads(frame[8 : 8 + number])
        prompt_id, node, mime = data["prompt_id"], data["node_id"], data.get("image_type", "image/jpeg")
        if not all(isinstance(value, str) for value in (prompt_id, node, mime)):
            return None
        return PreviewFrame(prompt_id, node, mime, frame[8 + number :])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_message(text: str) -> tuple[str, dict[str, Any]] | None:
    """Type and data of a text frame; None where it is no message."""
    try:
        message = json.loads(text)
        kind, data = message["type"], message["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (kind, data) if isinstance(kind, str) and isinstance(data, dict) else None


class JobMessages:
    """Turns the messages about one job into events, each of which comes once.

    `ended`: the server has said that it is through with the job. `last`: how it failed or was stopped, if it was.
    `outputs`: what nodes have shown so far. `node`: the node that began last.
    """

    def __init__(self, prompt_id: str) -> None:
        self.prompt_id = prompt_id
        self.ended = False
        self.succeeded = False
        self.last: Failed | Interrupted | None = None
        self.outputs: dict[str, dict[str, Any]] = {}
        self.node: str | None = None
        self._cached: set[str] = set()
        self._started: set[str] = set()
        self._finished: set[str] = set()

    def receive(self, kind: str, data: dict[str, Any]) -> list[Event]:
        """The events that a message stands for; none for a message that is not understood."""
        read = getattr(self, f"_read_{kind}", None) if kind in _KINDS else None
        if read is None:
            return []
        try:
            return read(data)
        except (KeyError, TypeError, ValueError, AttributeError):
            return []

    def preview(self, frame: PreviewFrame) -> Preview:
        return Preview(self.prompt_id, frame.node or self.node, frame.image, frame.mime)

    def _read_execution_start(self, data: dict[str, Any]) -> list[Event]:
        return [Started(self.prompt_id)]

    def _read_execution_cached(self, data: dict[str, Any]) -> list[Event]:
        nodes = tuple(str(node) for node in data["nodes"])
        self._cached.update(nodes)
        return [NodesCached(self.prompt_id, nodes)] if nodes else []

    def _read_executing(self, data: dict[str, Any]) -> list[Event]:
        node = data["node"]
        if node is None:
            self.ended = True
            return []
        self.node = str(node)
        # A node with lazy inputs is announced again when they are there.
        if self.node in self._started:
            return []
        self._started.add(self.node)
        return [NodeStarted(self.prompt_id, self.node)]

    def _read_progress(self, data: dict[str, Any]) -> list[Event]:
        return [NodeProgress(self.prompt_id, str(data["node"]), float(data["value"]), float(data["max"]))]

    def _read_progress_state(self, data: dict[str, Any]) -> list[Event]:
        found: list[Event] = []
        for key, state in data["nodes"].items():
            node = str(key)
            if state["state"] == "finished" and node not in self._finished | self._cached:
                self._finished.add(node)
                found.append(NodeFinished(self.prompt_id, node))
        return found

    def _read_executed(self, data: dict[str, Any]) -> list[Event]:
        node, output = str(data["node"]), data["output"]
        if not isinstance(output, dict):
            return []
        self.outputs[node] = output
        return [NodeOutput(self.prompt_id, node, output)]

    def _read_execution_error(self, data: dict[str, Any]) -> list[Event]:
        if data.get("exception_type") == "ExecutionBlocked":
            return [NodeBlocked(self.prompt_id, str(data["node_id"]), str(data.get("exception_message", "")))]
        self.last = failure(self.prompt_id, data)
        return []

    def _read_execution_interrupted(self, data: dict[str, Any]) -> list[Event]:
        self.last = Interrupted(self.prompt_id, str(data["node_id"]))
        return []

    def _read_execution_success(self, data: dict[str, Any]) -> list[Event]:
        self.succeeded = True
        return []


_KINDS = {name.removeprefix("_read_") for name in vars(JobMessages) if name.startswith("_read_")}


def failure(prompt_id: str, data: dict[str, Any]) -> Failed:
    """The event that an `execution_error` message stands for."""
    traceback = data.get("traceback")
    return Failed(
        prompt_id,
        str(data.get("node_id")),
        str(data.get("node_type")),
        str(data.get("exception_message") or ""),
        str(data.get("exception_type") or "unknown error"),
        tuple(str(line) for line in traceback) if isinstance(traceback, list) else (),
    )


def outcome_in_history(prompt_id: str, entry: dict[str, Any]) -> Event:
    """How the job ended that an entry of the history is about."""
    outputs, status = entry.get("outputs"), entry.get("status")
    status = status if isinstance(status, dict) else {}
    if status.get("status_str") == "success":
        return Finished(prompt_id, Result(prompt_id, outputs if isinstance(outputs, dict) else {}))
    messages = status.get("messages")
    for message in reversed(messages if isinstance(messages, list) else []):
        if not isinstance(message, list) or len(message) != 2 or not isinstance(message[1], dict):
            continue
        kind, data = message
        if kind == "execution_error" and data.get("exception_type") != "ExecutionBlocked":
            return failure(prompt_id, data)
        if kind == "execution_interrupted":
            return Interrupted(prompt_id, str(data.get("node_id")))
    return Failed(prompt_id, "?", "unknown", "the server does not say why", "unknown error")
