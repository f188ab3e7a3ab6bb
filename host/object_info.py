"""What a node class is, in the form that ComfyUI's `/object_info` gives and its frontend reads."""

from __future__ import annotations

from typing import Any

from .registry import NodeRegistry


def object_info(registry: NodeRegistry, class_type: str) -> dict[str, Any]:
    """The description of one class; only plain data."""
    node_class = registry[class_type]
    inputs = node_class.INPUT_TYPES()
    outputs = list(node_class.RETURN_TYPES)
    info: dict[str, Any] = {
        "input": _plain(inputs),
        "input_order": {kind: list(entries) for kind, entries in inputs.items()},
        "output": _plain(outputs),
        "output_is_list": list(getattr(node_class, "OUTPUT_IS_LIST", [False] * len(outputs))),
        "output_name": list(getattr(node_class, "RETURN_NAMES", outputs)),
        "name": class_type,
        "display_name": registry.title(class_type),
        "description": getattr(node_class, "DESCRIPTION", ""),
        "python_module": registry.python_module(class_type),
        "category": getattr(node_class, "CATEGORY", "sd"),
        "output_node": bool(getattr(node_class, "OUTPUT_NODE", False)),
    }
    if hasattr(node_class, "OUTPUT_TOOLTIPS"):
        info["output_tooltips"] = list(node_class.OUTPUT_TOOLTIPS)
    if hasattr(node_class, "SEARCH_ALIASES"):
        info["search_aliases"] = list(node_class.SEARCH_ALIASES)
    for attribute, key in (("DEPRECATED", "deprecated"), ("EXPERIMENTAL", "experimental"), ("API_NODE", "api_node")):
        if getattr(node_class, attribute, False):
            info[key] = True
    return info


def _plain(value: Any) -> Any:
    """`value` with tuples as lists, as JSON has them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
