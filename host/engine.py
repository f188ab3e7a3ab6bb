"""The host itself: takes prompts, queues them, runs them one by one, remembers what came of them.

It knows nothing of HTTP. A server calls `submit` for `POST /prompt`, lets one thread call `run_next` in a loop, and
sends what `deliver` hands it to its sockets; the command line does the same for one prompt.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import threading
import uuid
from dataclasses import dataclass, field
from typing import Any

from ..nodes import runtime
from .backend import HostBackend
from .core_nodes import CORE_NODES, CORE_TITLES
from .executor import Deliver, Executor
from .folders import DataFolders
from .object_info import object_info
from .problems import problem
from .registry import NodeRegistry
from .validation import validate_prompt

# Older entries are forgotten first.
HISTORY_LENGTH = 10_000


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
        """The form in which the API shows a prompt."""
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]


class Host:
    """Node classes, a queue, an executor and a history.

    `deliver(type, data, client_id)` receives every message, in order; a `client_id` of None means all clients. Messages
    about a prompt that names no client are not sent, except progress, interruption and the state of the queue.
    `preview` messages carry a PIL image (see `progress.NodeProgress`); all others are plain data.
    """

    def __init__(self, folders: DataFolders, deliver: Deliver | None = None) -> None:
        self.folders = folders
        self.backend = HostBackend(folders)
        self.registry = NodeRegistry()
        self.registry.add(CORE_NODES, CORE_TITLES)
        self._deliver: Deliver = deliver or (lambda kind, data, client: None)
        self.executor = Executor(self.registry, self._deliver)
        self._pending: list[Job] = []
        self._running: Job | None = None
        self._history: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._order = itertools.count()

    def submit(self, body: Any) -> tuple[int, dict[str, Any]]:
        """Take a request as `POST /prompt` has it; returns the HTTP status and the answer.

        Keys: `prompt`; optional `client_id`, `prompt_id`, `extra_data`, `number`, `front`, `partial_execution_targets`.
        """
        number = next(self._numbers)
        error = _request_error(body)
        if error is not None:
            return 400, {"error": error, "node_errors": {}}
        # The caller's objects stay as they are: validation writes converted values into the prompt.
        try:
            body = copy.deepcopy(body)
        except RecursionError:
            return 400, {"error": problem("invalid_prompt", "The request is nested too deeply."), "node_errors": {}}
        if "number" in body:
            priority = body["number"]
        else:
            priority = -number if body.get("front") else number
        with runtime.using(self.backend):
            verdict = validate_prompt(body["prompt"], self.registry, body.get("partial_execution_targets"))
        if verdict.error is not None:
            return 400, {"error": verdict.error, "node_errors": verdict.node_errors}
        extra_data = body.get("extra_data") or {}
        if body.get("client_id") is not None:
            extra_data["client_id"] = body["client_id"]
        prompt_id = body.get("prompt_id") or str(uuid.uuid4())
        job = Job(priority, next(self._order), prompt_id, body["prompt"], extra_data, verdict.outputs)
        with self._changed:
            heapq.heappush(self._pending, job)
            self._announce_queue()
            self._changed.notify()
        return 200, {"prompt_id": prompt_id, "number": priority, "node_errors": verdict.node_errors}

    def run_next(self, timeout: float | None = 0.0) -> str | None:
        """Run the next prompt of the queue and return its id; None where none came within `timeout` seconds.

        A `timeout` of None waits for ever. Only one thread may call this.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._pending), timeout):
                return None
            job = self._running = heapq.heappop(self._pending)
            self.executor.rearm()
            self._announce_queue()
        result: dict[str, Any] = {"outputs": {}, "meta": {}, "status": None}
        try:
            with runtime.using(self.backend):
                result = self.executor.execute(job.prompt_id, job.prompt, job.outputs, job.extra_data)
        finally:
            with self._changed:
                self._running = None
                self._remember(job, result)
                self._announce_queue()
        # Clients read the history when this arrives, so it comes last.
        client = job.extra_data.get("client_id")
        if client is not None:
            self._deliver("executing", {"node": None, "prompt_id": job.prompt_id}, client)
        return job.prompt_id

    def interrupt(self, prompt_id: str | None = None) -> bool:
        """Stop the running prompt, or only if it is `prompt_id`; says whether there was one to stop."""
        with self._changed:
            if self._running is None or prompt_id not in (None, self._running.prompt_id):
                return False
            self.executor.interrupt()
            return True

    def queue(self) -> tuple[list[Job], list[Job]]:
        """The running prompt (none or one) and the waiting ones, in the order in which they will run."""
        with self._changed:
            return [self._running] if self._running else [], sorted(self._pending)

    def remove_pending(self, prompt_id: str | None = None) -> bool:
        """Take one waiting prompt, or all, out of the queue; says whether any was there."""
        with self._changed:
            kept = [] if prompt_id is None else [job for job in self._pending if job.prompt_id != prompt_id]
            removed = len(kept) < len(self._pending)
            if removed:
                heapq.heapify(kept)
                self._pending = kept
                self._announce_queue()
            return removed

    def history(self, prompt_id: str | None = None) -> dict[str, dict[str, Any]]:
        """What came of the prompts, oldest first, or of one (empty where it is unknown)."""
        with self._changed:
            if prompt_id is None:
                return dict(self._history)
            return {prompt_id: self._history[prompt_id]} if prompt_id in self._history else {}

    def forget(self, prompt_id: str | None = None) -> None:
        """Remove one entry of the history, or all."""
        with self._changed:
            if prompt_id is None:
                self._history.clear()
            else:
                self._history.pop(prompt_id, None)

    def object_info(self, class_type: str | None = None) -> dict[str, Any]:
        """Descriptions of all node classes, or of one (empty where it is unknown)."""
        names = list(self.registry.classes) if class_type is None else [class_type]
        with runtime.using(self.backend):
            return {name: object_info(self.registry, name) for name in names if name in self.registry}

    def _remember(self, job: Job, result: dict[str, Any]) -> None:
        self._history.pop(job.prompt_id, None)
        self._history[job.prompt_id] = {"prompt": job.as_list(), **result}
        while len(self._history) > HISTORY_LENGTH:
            del self._history[next(iter(self._history))]

    def _announce_queue(self) -> None:
        remaining = len(self._pending) + (self._running is not None)
        self._deliver("status", {"status": {"exec_info": {"queue_remaining": remaining}}}, None)


def _request_error(body: Any) -> dict[str, Any] | None:
    if not isinstance(body, dict):
        return problem("invalid_prompt", "The request is not a JSON object.")
    if "prompt" not in body:
        return problem("no_prompt", "No prompt provided", "No prompt provided")
    number = body.get("number", 0)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        return problem("invalid_prompt", "The queue number is not a number.", f"number, {number}")
    targets = body.get("partial_execution_targets")
    checks = (
        ("extra_data", dict, "an object"),
        ("prompt_id", str, "a string"),
        ("client_id", str, "a string"),
        ("partial_execution_targets", list, "a list of node ids"),
    )
    for key, kind, wanted in checks:
        if body.get(key) is not None and not isinstance(body[key], kind):
            return problem("invalid_prompt", f"{key} is not {wanted}.", f"{key}, {body[key]}")
    if any(not isinstance(target, str) for target in targets or ()):
        return problem("invalid_prompt", "partial_execution_targets is not a list of node ids.", str(targets))
    return None
