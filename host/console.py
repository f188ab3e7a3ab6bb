"""A run's progress for a person at a terminal: one line per node."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from typing import Any, TextIO

_BAR_WIDTH = 24


class ConsoleProgress:
    """Turns the messages of a run into lines on `stream`; on a terminal the running node's line is redrawn.

    `titles` names the nodes that may run.
    """

    def __init__(self, titles: dict[str, str], stream: TextIO) -> None:
        self._titles = dict(titles)
        self._stream = stream
        self._redraws = stream.isatty()
        self._begun: dict[str, float] = {}
        self._node: str | None = None

    def receive(self, kind: str, data: dict[str, Any]) -> None:
        """Show a message of the executor."""
        if kind == "executing" and data["node"] is not None:
            self.begin(data["node"])
        elif kind == "progress":
            self.advance(data["value"], data["max"])
        elif kind == "progress_state" and self._node is not None:
            if data["nodes"].get(self._node, {}).get("state") == "finished":
                self.end(self._node)
        elif kind == "execution_error" and data["exception_type"] == "ExecutionBlocked":
            self.say(data["node_id"], data["exception_message"])
        elif kind in ("execution_error", "execution_interrupted"):
            self.clear()
        elif kind == "executed":
            for text in data["output"].get("text", ()):
                self.say(data["node"], text)

    def step(self, node: str, value: int, maximum: int) -> None:
        """Report a step of work that is no graph; the line of `node` ends with its last step."""
        if node != self._node:
            self.begin(node)
        self.advance(value, maximum)
        if value == maximum:
            self.end(node)

    def leave_out(self, nodes: Iterable[str]) -> None:
        """Say that these nodes will not run."""
        for node in nodes:
            self._titles.pop(node, None)

    def begin(self, node: str) -> None:
        self._node = node
        self._begun.setdefault(node, time.monotonic())
        self.advance(0, 0)

    def end(self, node: str) -> None:
        """Write the line of a node that is through; nothing where another one is running."""
        if node != self._node:
            return
        self._line(f"{self._heading()}  {time.monotonic() - self._begun[node]:.1f} s")
        self._node = None

    def say(self, node: str, text: str) -> None:
        """Write what a node says of itself."""
        self._line(f"{self._titles.get(node, node)}: {text}")

    def clear(self) -> None:
        """Take the line that is being redrawn off the terminal."""
        if self._redraws:
            self._stream.write("\r\x1b[K")

    def advance(self, value: float, maximum: float) -> None:
        """Draw how far the running node is."""
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
        self.clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def _heading(self) -> str:
        assert self._node is not None
        place = list(self._begun).index(self._node) + 1
        return f"{place}/{len(self._titles)} {self._titles.get(self._node, self._node)}"
