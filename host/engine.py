"""The host itself: takes prompts, queues them, runs them one by one, remembers what came of them.

It knows nothing of HTTP. A server calls `submit` for `POST /prompt`, lets one thread call `run_next` in a loop, and
sends what `deliver` hands it to its sockets; the command line does the same for one prompt.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import logging
import math
import threading
import time
import uuid
from typing import Any

from ..nodes import runtime
from .backend import HostBackend
from .core_nodes import CORE_NODES, CORE_TITLES
from .executor import Deliver, Executor
from .folders import DataFolders
from .jobs import IN_PROGRESS, PENDING, Job
from .object_info import object_info
from .problems import problem
from .registry import NodeRegistry
from .validation import validate_prompt

# Older entries are forgotten first.
HISTORY_LENGTH = 10_000

_log = logging.getLogger(__name__)


class Host:
    """Node classes, a queue, an executor and a history.

    `deliver(type, data, client_id)` receives every message, in order; a `client_id` of None means all clients. Messages
    about a prompt that names no client are not sent, except progress, interruption and the state of the queue.
    `preview` messages carry a picture (see `progress.NodeProgress`); all others are plain data.
    """

    def __init__(
        self, folders: DataFolders, deliver: Deliver | None = None, *, history_length: int = HISTORY_LENGTH
    ) -> None:
        self.folders = folders
        self.backend = HostBackend(folders)
        self.registry = NodeRegistry()
        self.registry.add(CORE_NODES, CORE_TITLES)
        self._deliver: Deliver = deliver or (lambda kind, data, client: None)
        self.executor = Executor(self.registry, self._deliver)
        self._pending: list[Job] = []
        self._running: Job | None = None
        self._history: dict[str, dict[str, Any]] = {}
        self._summaries: dict[str, dict[str, Any]] = {}
        self._history_length = history_length
        self._changed = threading.Condition()
        self._validating = threading.Lock()
        self._numbers = itertools.count()
        self._order = itertools.count()
        self._free_requested = False
        self._closed = False

    def submit(self, body: Any) -> tuple[int, dict[str, Any]]:
        """Take a request as `POST /prompt` has it; returns the HTTP status and the answer.

        Keys: `prompt`; optional `client_id`, `prompt_id`, `extra_data`, `number`, `front`, `partial_execution_targets`.
        """
        # One at a time: nodes' own validation need not be safe in threads, and prompts queue in the order of numbers.
        with self._validating:
            return self._submit(body)

    def _submit(self, body: Any) -> tuple[int, dict[str, Any]]:
        number = next(self._numbers)
        error = _request_error(body)
        if error is not None:
            return 400, {"error": error, "node_errors": {}}
        # The caller's objects stay as they are: validation writes converted values into the prompt.
        try:
            body = copy.deepcopy(body)
        except RecursionError:
            return 400, {"error": problem("invalid_prompt", "The request is nested too deeply."), "node_errors": {}}
        if body.get("number") is not None:
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
        extra_data["create_time"] = int(time.time() * 1000)
        prompt_id = body.get("prompt_id") or str(uuid.uuid4())
        job = Job(priority, next(self._order), prompt_id, body["prompt"], extra_data, verdict.outputs)
        with self._changed:
            heapq.heappush(self._pending, job)
            self._announce_queue()
            self._changed.notify()
        return 200, {"prompt_id": prompt_id, "number": priority, "node_errors": verdict.node_errors}

    def run_next(self, timeout: float | None = 0.0) -> str | None:
        """Run the next prompt of the queue and return its id; None where none came within `timeout` seconds.

        A `timeout` of None waits until a prompt comes or `close` is called. Only one thread may call this.
        """
        job = self._take(timeout)
        if job is None:
            return None
        # What the history says should the run be cut short by more than an error of a node.
        result: dict[str, Any] = {
            "outputs": {},
            "meta": {},
            "status": {"status_str": "error", "completed": False, "messages": []},
        }
        try:
            with runtime.using(self.backend):
                result = self.executor.execute(job.prompt_id, job.prompt, job.outputs, job.extra_data)
        finally:
            with self._changed:
                self._running = None
                self._remember(job, result)
                self._free_requested |= _ran_out_of_memory(result)
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

    def cancel(self, prompt_id: str) -> bool:
        """Stop a prompt, or take it out of the queue if it still waits; says whether it was running or waiting."""
        with self._changed:
            return self.interrupt(prompt_id) or self.remove_pending(prompt_id)

    def free(self) -> None:
        """Forget all outputs, and with them the models, when the running prompt has ended (now, if there is none)."""
        with self._changed:
            self._free_requested = True
            self._changed.notify()

    def close(self) -> None:
        """Stop the running prompt and let `run_next` return None from now on."""
        with self._changed:
            self._closed = True
            self.executor.interrupt()
            self._changed.notify()

    @property
    def closed(self) -> bool:
        return self._closed

    def queue(self) -> tuple[list[Job], list[Job]]:
        """The running prompt (none or one) and the waiting ones, in the order in which they will run."""
        with self._changed:
            return [self._running] if self._running else [], sorted(self._pending)

    def queue_length(self) -> int:
        """How many prompts run or wait."""
        with self._changed:
            return len(self._pending) + (self._running is not None)

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

    def jobs(self) -> list[dict[str, Any]]:
        """Summaries of all prompts that wait, run or are remembered (see `jobs.Job`)."""
        with self._changed:
            running = [self._running.summary(IN_PROGRESS)] if self._running else []
            return [job.summary(PENDING) for job in sorted(self._pending)] + running + list(self._summaries.values())

    def forget(self, prompt_id: str | None = None) -> None:
        """Remove one entry of the history, or all."""
        with self._changed:
            for entries in (self._history, self._summaries):
                if prompt_id is None:
                    entries.clear()
                else:
                    entries.pop(prompt_id, None)

    def object_info(self, class_type: str | None = None) -> dict[str, Any]:
        """Descriptions of all node classes, or of one (empty where it is unknown).

        A class that cannot describe itself is left out and logged, so that it takes no other with it.
        """
        names = list(self.registry.classes) if class_type is None else [class_type]
        found = {}
        with runtime.using(self.backend):
            for name in names:
                if name in self.registry:
                    try:
                        found[name] = object_info(self.registry, name)
                    except Exception:
                        _log.exception("node class %s is left out: it cannot be described", name)
        return found

    def _take(self, timeout: float | None) -> Job | None:
        """The next prompt, which counts as running from now on."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._free_requested or self._closed or self._pending, timeout)
                if not self._free_requested:
                    if self._closed or not self._pending:
                        return None
                    self._running = heapq.heappop(self._pending)
                    self.executor.rearm()
                    self._announce_queue()
                    return self._running
                self._free_requested = False
            self.executor.cache.clear()
            runtime.release_unused_memory()

    def _remember(self, job: Job, result: dict[str, Any]) -> None:
        self.forget(job.prompt_id)
        self._history[job.prompt_id] = {"prompt": job.as_list(), **result}
        self._summaries[job.prompt_id] = job.summary_of(result)
        while len(self._history) > self._history_length:
            self.forget(next(iter(self._history)))

    def _announce_queue(self) -> None:
        self._deliver("status", {"status": {"exec_info": {"queue_remaining": self.queue_length()}}}, None)


def _ran_out_of_memory(result: dict[str, Any]) -> bool:
    messages = result["status"]["messages"]
    # MemoryError, torch.OutOfMemoryError
    return bool(messages) and messages[-1][1].get("exception_type", "").endswith("MemoryError")


def _request_error(body: Any) -> dict[str, Any] | None:
    if not isinstance(body, dict):
        return problem("invalid_prompt", "The request is not a JSON object.")
    if "prompt" not in body:
        return problem("no_prompt", "No prompt provided", "No prompt provided")
    number = body.get("number")
    if number is not None and not _is_number(number):
        return problem("invalid_prompt", "The queue number is not a number.", f"number, {number!r}"[:100])
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


def _is_number(value: Any) -> bool:
    # Integers too large for a float would be lost on the editor's side.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(_as_float(value))


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
