"""What the commands take and say, how they end, and what Ctrl-C does to them."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that runs a graph."""
    parser.add_argument("workflow", type=Path, help="JSON in API format, or a PNG that was saved with its graph")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="set an input; NODE is an id, or a class or title that only one node has",
    )
    parser.add_argument(
        "--workflow", dest="editor_file", type=Path, metavar="FILE", help="workflow to keep in the pictures"
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code a node failed")


def say(message: str) -> None:
    """Tell the user something, on standard error."""
    print(f"cascade: {message}", file=sys.stderr)


def refuse(message: str) -> int:
    """Say why nothing was run; returns the exit code."""
    say(message)
    return USAGE


@contextmanager
def interrupting(*steps: Callable[[], object]) -> Iterator[None]:
    """Let the first Ctrl-C inside the block call the first of `steps`, and so on; one more ends the program."""
    left = list(steps)

    def on_interrupt(number: int, frame: object) -> None:
        step = left.pop(0)
        if not left:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        step()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
