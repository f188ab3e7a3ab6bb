"""Calling a node's functions: arguments, lists, blockers, results.

Every value travels as a list. A node runs once per list entry, shorter lists repeating their last entry, unless it
declares `INPUT_IS_LIST` and takes the lists themselves.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from .graph import Prompt, as_link, constant
from .registry import Declaration
from .signals import ExecutionBlocker

Lists = dict[str, list[Any]]


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a node's function; one that is `async` is run to its end."""
    result = function(**arguments)
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    return result


def map_over_lists(
    function: Callable[..., Any],
    arguments: Lists,
    *,
    takes_lists: bool = False,
    on_block: Callable[[ExecutionBlocker], ExecutionBlocker] = lambda blocker: blocker,
    before: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The results of `function` over the lists in `arguments`, one per call.

    `before` runs ahead of each call. A call that would receive an ExecutionBlocker is not made: `on_block` of the
    blocker takes its place among the results.
    """
    if takes_lists:
        rounds = [arguments]
    else:
        count = max((len(values) for values in arguments.values()), default=0)
        # With nothing but empty lists there is nothing to map over, and the node is called once, without them.
        rounds = [
            {name: values[min(index, len(values) - 1)] for name, values in arguments.items()} for index in range(count)
        ] or [{}]
    results = []
    for row in rounds:
        before()
        blocker = _first_blocker(row, takes_lists)
        results.append(call(function, row) if blocker is None else on_block(blocker))
    return results


def _first_blocker(row: dict[str, Any], takes_lists: bool) -> ExecutionBlocker | None:
    for value in row.values():
        for item in value if takes_lists else (value,):
            if isinstance(item, ExecutionBlocker):
                return item
    return None


def accepted(arguments: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Those of `arguments` that `function` takes."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def constant_arguments(inputs: dict[str, Any], declaration: Declaration, function: Callable[..., Any]) -> Lists:
    """What can be said before a run: the constant inputs among the arguments that `function` takes.

    A linked input is left out, or None where `function` cannot be called without it.
    """
    parameters = inspect.signature(function).parameters
    arguments: Lists = {}
    for name, value in accepted(inputs, function).items():
        if as_link(value) is None:
            if declaration.find(name) is not None:
                arguments[name] = [constant(value)]
        elif name in parameters and parameters[name].default is inspect.Parameter.empty:
            arguments[name] = [None]
    return arguments


def hidden_arguments(
    node_id: str,
    declaration: Declaration,
    *,
    prompt: Prompt | None = None,
    dynamic_prompt: object | None = None,
    extra_data: dict[str, Any] | None = None,
) -> Lists:
    """The hidden inputs that a node asked for."""
    known = {
        "UNIQUE_ID": node_id,
        "PROMPT": {} if prompt is None else prompt,
        "DYNPROMPT": dynamic_prompt,
        "EXTRA_PNGINFO": (extra_data or {}).get("extra_pnginfo"),
    }
    return {name: [known[kind]] for name, kind in declaration.hidden.items() if kind in known}


def split_results(results: list[Any], node_class: Any) -> tuple[list[list[Any]], dict[str, list[Any]]]:
    """Outputs (a list of values per slot) and what is to be shown, from the results of a node's calls."""
    rows, shown = [], []
    for result in results:
        if isinstance(result, dict):
            if "expand" in result:
                raise ValueError(
                    "the node returned 'expand', and this host does not expand nodes into graphs; "
                    "use a node that returns its results, or run the graph in ComfyUI"
                )
            if "ui" in result:
                shown.append(result["ui"])
            if "result" not in result:
                continue
            result = result["result"]
        rows.append(_row(result, node_class))
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the node returned a different number of outputs for different entries of its input lists")
    is_list = tuple(getattr(node_class, "OUTPUT_IS_LIST", ()))
    outputs = []
    for slot in range(len(rows[0]) if rows else 0):
        values = [row[slot] for row in rows]
        outputs.append(_joined(values) if slot < len(is_list) and is_list[slot] else values)
    names = shown[0] if shown else ()
    return outputs, {name: [item for part in shown for item in part[name]] for name in names}


def _row(result: Any, node_class: Any) -> tuple[Any, ...]:
    types = node_class.RETURN_TYPES
    if isinstance(result, ExecutionBlocker):
        return (result,) * len(types)
    if result is None and not types:
        return ()
    if not isinstance(result, (tuple, list)):
        raise ValueError(
            f"the node must return a tuple of {len(types)} outputs, but its function returned {type(result).__name__}"
        )
    return tuple(result)


def _joined(values: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for value in values:
        if isinstance(value, ExecutionBlocker):
            joined.append(value)
        else:
            joined.extend(value)
    return joined
