"""What happens to a job, as a client sees it. `prompt_id` is the job's id, `node` a node's id in the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .results import Result


@dataclass(frozen=True)
class Event:
    prompt_id: str


@dataclass(frozen=True)
class Started(Event):
    """The job's turn has come."""


@dataclass(frozen=True)
class NodesCached(Event):
    """These nodes need not run: the server still has what they gave before."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class NodeStarted(Event):
    node: str


@dataclass(frozen=True)
class NodeProgress(Event):
    """`value` of `maximum` steps of a node are done."""

    node: str
    value: float
    maximum: float


@dataclass(frozen=True)
class Preview(Event):
    """A picture of how far a node is, the bytes of a file of type `mime`; `node` is None where it is not known."""

    node: str | None
    image: bytes = field(repr=False)
    mime: str


@dataclass(frozen=True)
class NodeOutput(Event):
    """What a node shows or has saved, as the server puts it: `{"images": [...], "text": [...], ...}`."""

    node: str
    output: dict[str, Any]


@dataclass(frozen=True)
class NodeFinished(Event):
    node: str


@dataclass(frozen=True)
class NodeBlocked(Event):
    """A node was kept from running on purpose, for the reason in `message`; the rest of the graph goes on."""

    node: str
    message: str


@dataclass(frozen=True)
class Finished(Event):
    """Last event of a job that ran to its end."""

    result: Result


@dataclass(frozen=True)
class Failed(Event):
    """Last event of a job in which a node raised an exception."""

    node: str
    node_type: str
    message: str
    exception_type: str
    traceback: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Interrupted(Event):
    """Last event of a job that was stopped; `node` is None where it had not begun."""

    node: str | None
