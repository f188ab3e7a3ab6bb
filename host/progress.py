"""How far the nodes of a run are, and the bar that nodes report through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

Send = Callable[[str, dict[str, Any]], None]


class NodeProgress:
    """The progress of all nodes of one run, announced at every change.

    Messages: `progress_state` with every node that has started; `progress` for a node's own steps; `preview`, whose
    data holds a picture under `image` (see `ProgressBar.update_absolute`) besides the ids of the node, for a host to
    encode for its clients.
    """

    def __init__(self, prompt_id: str, send: Send, check_interrupted: Callable[[], None]) -> None:
        self._prompt_id = prompt_id
        self._send = send
        self._check_interrupted = check_interrupted
        self._nodes: dict[str, dict[str, Any]] = {}

    def start(self, node_id: str) -> None:
        self._set(node_id, 0.0, 1.0, "running")

    def finish(self, node_id: str) -> None:
        maximum = self._nodes[node_id]["max"] if node_id in self._nodes else 1.0
        self._set(node_id, maximum, maximum, "finished")

    def update(self, node_id: str, value: float, maximum: float, preview: Any | None = None) -> None:
        """Report a node's own steps; raises RunInterrupted where the user stopped the run."""
        self._check_interrupted()
        self._set(node_id, value, maximum, "running")
        if preview is not None:
            self._send("preview", {**self._ids(node_id), "image": preview})
        self._send("progress", {"value": value, "max": maximum, "prompt_id": self._prompt_id, "node": node_id})

    def check_interrupted(self) -> None:
        self._check_interrupted()

    def _set(self, node_id: str, value: float, maximum: float, state: str) -> None:
        # Entries are replaced and never changed, so a message may share them.
        self._nodes[node_id] = {"value": value, "max": maximum, "state": state, **self._ids(node_id)}
        self._send("progress_state", {"prompt_id": self._prompt_id, "nodes": dict(self._nodes)})

    def _ids(self, node_id: str) -> dict[str, Any]:
        # Without node expansion, a node is always displayed as itself and has no parent.
        return {
            "node_id": node_id,
            "prompt_id": self._prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }


class RunningNode(NamedTuple):
    """The node that this thread is executing."""

    node_id: str
    progress: NodeProgress


_running: ContextVar[RunningNode | None] = ContextVar("cascade_running_node", default=None)


@contextlib.contextmanager
def running(node_id: str, progress: NodeProgress) -> Iterator[None]:
    """Let bars that are made inside the block report for `node_id`."""
    token = _running.set(RunningNode(node_id, progress))
    try:
        yield
    finally:
        _running.reset(token)


def running_node() -> RunningNode | None:
    return _running.get()


class ProgressBar:
    """The progress of the node that made it; outside of a run it reports to nobody.

    `update` counts steps, `update_absolute` sets them. Both raise RunInterrupted where the user stopped the run.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.current = 0
        self._node = running_node()

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)

    def update_absolute(self, value: int, total: int | None = None, preview: Any | None = None) -> None:
        """Set the steps done, optionally the total, and show `preview`.

        preview: a PIL image, or a tuple of format ("JPEG" or "PNG"), PIL image and longest side (None: as it is).
        """
        if total is not None:
            self.total = total
        self.current = min(value, self.total)
        if self._node is not None:
            self._node.progress.update(self._node.node_id, self.current, self.total, preview)
