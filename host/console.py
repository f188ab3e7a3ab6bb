"""A run's progress for a person at a terminal: one line per node."""

from __future__ import annotations

import shutil
import time
from typing import Any, TextIO

_BAR_WIDTH = 24


class ConsoleProgress:
    """Turns the messages of a run into lines on `stream`; on a terminal the running node's line is redrawn.

    `titles` names the nodes that may run.
    """

    def __init__(self, titles: dict[str, str], stream: TextIO) -> None:
        self._titles = titles
        self._stream = stream
        self._redraws = stream.isatty()
        self._begun: dict[str, float] = {}
        self._node: str | None = None

    def receive(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data["node"] is not None:
            self._node = data["node"]
            self._begun.setdefault(self._node, time.monotonic())
            self._draw(0, 0)
        elif kind == "progress":
            self._draw(data["value"], data["max"])
        elif kind == "progress_state" and self._node is not None:
            if data["nodes"].get(self._node, {}).get("state") == "finished":
                self._end()
        elif kind == "execution_error" and data["exception_type"] == "ExecutionBlocked":
            self._line(f"{self._titles.get(data['node_id'], data['node_id'])}: {data['exception_message']}")
        elif kind in ("execution_error", "execution_interrupted"):
            self._clear()
        elif kind == "executed":
            for text in data["output"].get("text", ()):
                self._line(f"{self._titles.get(data['node'], data['node'])}: {text}")

    def step(self, node: str, value: int, maximum: int) -> None:
        """Report a step of work that is no graph; the line of `node` ends with its last step."""
        if node != self._node:
            self.receive("executing", {"node": node})
        self._draw(value, maximum)
        if value == maximum:
            self._end()

    def _end(self) -> None:
        assert self._node is not None
        self._line(f"{self._heading()}  {time.monotonic() - self._begun[self._node]:.1f} s")
        self._node = None

    def _draw(self, value: float, maximum: float) -> None:
        if not self._redraws or self._node is None:
            return
        text = self._heading()
        if maximum:
            filled = round(_BAR_WIDTH * min(value / maximum, 1))
            seconds = time.monotonic() - self._begun[self._node]
            text += f"  [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {value:g}/{maximum:g}  {seconds:.0f} s"
        # A line that wraps could not be drawn over.
        self._stream.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()

    def _line(self, text: str) -> None:
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._redraws:
            self._stream.write("\r\x1b[K")

    def _heading(self) -> str:
        assert self._node is not None
        place = list(self._begun).index(self._node) + 1
        return f"{place}/{len(self._titles)} {self._titles.get(self._node, self._node)}"
