"""Outputs kept from one prompt to the next, found again by what went into them.

A node's signature is a number that stands for its class, its constants, the signatures of the nodes it is linked to
and what its `IS_CHANGED` said. Equal signatures mean equal outputs. What compares equal to nothing (NaN, objects that
are not plain data) gives a signature that never comes again.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

from .graph import Prompt, constant, links_of, post_order, sources_in
from .invoke import accepted, constant_arguments, hidden_arguments, map_over_lists
from .registry import Declarations, NodeRegistry
from .signals import ExecutionBlocker

Outputs = list[list[Any]]

_log = logging.getLogger(__name__)


class RunCache:
    """Node outputs and node objects, trimmed to the prompt that runs."""

    def __init__(self, registry: NodeRegistry) -> None:
        self._registry = registry
        self._numbers: dict[Any, int] = {}
        self._fresh: Iterator[int] = itertools.count()
        self._signatures: dict[str, int] = {}
        self._outputs: dict[int, Outputs] = {}
        self._shown: dict[int, dict[str, list[Any]]] = {}
        self._objects: dict[tuple[str, str], Any] = {}

    def begin(self, prompt: Prompt, declarations: Declarations) -> None:
        """Compute the signatures of `prompt` and forget what belongs to no node of it."""
        used: dict[Any, int] = {}
        self._signatures = {}
        for node_id in post_order(prompt, sources_in(prompt)):
            key = self._key(node_id, prompt, declarations)
            number = next(self._fresh) if key is None else self._numbers.get(key)
            if number is None:
                number = next(self._fresh)
            if key is not None:
                used[key] = self._numbers[key] = number
            self._signatures[node_id] = number
        self._numbers = used
        kept = set(self._signatures.values())
        self._outputs = {number: value for number, value in self._outputs.items() if number in kept}
        self._shown = {number: value for number, value in self._shown.items() if number in kept}
        self._objects = {
            (node_id, name): value
            for (node_id, name), value in self._objects.items()
            if node_id in prompt and prompt[node_id]["class_type"] == name
        }

    def outputs(self, node_id: str) -> Outputs | None:
        """The outputs of a node of the current prompt, or None where it has to run."""
        return self._outputs.get(self._signatures[node_id])

    def shown(self, node_id: str) -> dict[str, list[Any]] | None:
        """What a node of the current prompt showed to the client, or None."""
        return self._shown.get(self._signatures[node_id])

    def store(self, node_id: str, outputs: Outputs, shown: dict[str, list[Any]]) -> None:
        number = self._signatures[node_id]
        self._outputs[number] = outputs
        if shown:
            self._shown[number] = shown

    def node_object(self, node_id: str, class_type: str) -> Any:
        """The instance that runs a node; it lives as long as the node stays in the prompt with the same class."""
        key = (node_id, class_type)
        if key not in self._objects:
            self._objects[key] = self._registry[class_type]()
        return self._objects[key]

    def clear(self) -> None:
        """Forget all outputs and node objects."""
        self._outputs, self._shown, self._objects, self._numbers = {}, {}, {}, {}

    def _key(self, node_id: str, prompt: Prompt, declarations: Declarations) -> Any | None:
        """What a node's outputs depend on, hashable; None where it can equal nothing."""
        node = prompt[node_id]
        class_type = node["class_type"]
        node_class = self._registry[class_type]
        links = links_of(node)
        if any(link.node not in self._signatures for link in links.values()):
            return None  # a node that validation dropped: part of a cycle, or linked to nothing
        inputs = node.get("inputs", {})
        try:
            hidden = declarations[class_type].hidden.values()
            per_node = getattr(node_class, "NOT_IDEMPOTENT", False) or "UNIQUE_ID" in hidden
            items = tuple(
                (name, "link", self._signatures[links[name].node], links[name].slot)
                if name in links
                else (name, "value", _frozen(constant(inputs[name])))
                for name in sorted(inputs)
            )
            changed = _frozen(self._is_changed(node_id, node, declarations))
        except _EqualsNothing:
            return None
        except Exception as error:
            # The node's own functions: if it runs, it will say itself what is wrong.
            _log.info("node #%s (%s) cannot be cached: %s", node_id, class_type, error)
            return None
        return (class_type, node_id if per_node else None, items, changed)

    def _is_changed(self, node_id: str, node: dict[str, Any], declarations: Declarations) -> Any:
        node_class = self._registry[node["class_type"]]
        function = getattr(node_class, "IS_CHANGED", None)
        if function is None:
            return False
        declaration = declarations[node["class_type"]]
        arguments = constant_arguments(node.get("inputs", {}), declaration, function)
        arguments |= accepted(hidden_arguments(node_id, declaration), function)
        answers = map_over_lists(function, arguments, takes_lists=bool(getattr(node_class, "INPUT_IS_LIST", False)))
        return [None if isinstance(answer, ExecutionBlocker) else answer for answer in answers]


class _EqualsNothing(Exception):
    """A value of which no later value can be known to be the same."""


def _frozen(value: Any) -> Any:
    """A hashable stand-in of plain data that tells 1, 1.0 and True apart."""
    if value is None or isinstance(value, (str, bytes, bool, int)):
        return (type(value).__name__, value)
    if isinstance(value, float):
        if math.isnan(value):
            raise _EqualsNothing
        return ("float", value)
    if isinstance(value, (list, tuple)):
        return ("list", tuple(_frozen(item) for item in value))
    if isinstance(value, dict):
        return ("dict", frozenset((_frozen(key), _frozen(item)) for key, item in value.items()))
    raise _EqualsNothing
