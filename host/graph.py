"""Prompts as graphs: what is a link, what is a constant, what comes before what.

A prompt is `{node id: {"class_type": str, "inputs": {name: constant or [node id, slot]}}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

Prompt = dict[str, dict[str, Any]]


class Link(NamedTuple):
    """An input's source: which node, which of its outputs."""

    node: str
    slot: int


def as_link(value: Any) -> Link | None:
    """The link that an input value denotes, or None where it is a constant or malformed."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    node, slot = value
    if not isinstance(node, str) or not isinstance(slot, int) or isinstance(slot, bool) or slot < 0:
        return None
    return Link(node, slot)


def constant(value: Any) -> Any:
    """A constant input's value; `{"__value__": x}` stands for an `x` that would read as a link."""
    if isinstance(value, dict) and "__value__" in value:
        return value["__value__"]
    return value


def links_of(node: dict[str, Any]) -> dict[str, Link]:
    """The linked inputs of a node, by name."""
    links = {name: as_link(value) for name, value in node.get("inputs", {}).items()}
    return {name: link for name, link in links.items() if link is not None}


def sources_in(prompt: Prompt) -> Callable[[str], list[str]]:
    """A function that gives the nodes of `prompt` that a node is linked to."""
    return lambda node_id: [link.node for link in links_of(prompt[node_id]).values() if link.node in prompt]


def post_order(roots: Iterable[str], sources: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """Every node that `roots` depend on, themselves included, each once and after its sources.

    A link that closes a cycle is passed over. Iterative: a prompt may be a chain of thousands of nodes.
    """
    seen: set[str] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(sources(root)))]
        while stack:
            node, remaining = stack[-1]
            for source in remaining:
                if source not in seen:
                    seen.add(source)
                    stack.append((source, iter(sources(source))))
                    break
            else:
                stack.pop()
                yield node


def find_cycle(roots: Iterable[str], sources: Callable[[str], Iterable[str]]) -> list[str]:
    """The nodes of a cycle that `roots` depend on, first one repeated at the end; empty where there is none."""
    finished: set[str] = set()
    for root in roots:
        path: dict[str, Iterator[str]] = {} if root in finished else {root: iter(sources(root))}
        while path:
            node = next(reversed(path))
            for source in path[node]:
                if source in path:
                    nodes = list(path)
                    return [*nodes[nodes.index(source) :], source]
                if source not in finished:
                    path[source] = iter(sources(source))
                    break
            else:
                finished.add(node)
                del path[node]
    return []
