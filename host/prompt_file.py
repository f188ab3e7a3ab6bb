"""Prompts from files, and single values set in them from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .graph import Prompt
from .registry import InputSpec, NodeRegistry
from .validation import EDITOR_FORMAT, is_editor_format

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def read_prompt(path: Path) -> tuple[Prompt, dict[str, Any]]:
    """The prompt in a file and its `extra_data`; ValueError where there is none.

    The file is JSON in API format, or the body of a `POST /prompt`, or a PNG that was saved with its prompt.
    """
    content = _read(path)
    if content.startswith(_PNG_SIGNATURE):
        return _prompt_of_picture(path)
    data = _json(path, content)
    extra_data: dict[str, Any] = {}
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict) and "class_type" not in data["prompt"]:
        extra_data = data.get("extra_data") or {}
        data = data["prompt"]
    if is_editor_format(data):
        raise ValueError(f"{path}: {EDITOR_FORMAT[0]} {EDITOR_FORMAT[1]}")
    if not isinstance(extra_data, dict):
        raise ValueError(f"{path}: extra_data must be a JSON object")
    return _checked(path, data), extra_data


def read_workflow(path: Path) -> dict[str, Any]:
    """A workflow as the graph editor saves it; ValueError for anything else."""
    data = _json(path, _read(path))
    if not is_editor_format(data):
        raise ValueError(f"{path}: expected a workflow as ComfyUI's editor saves it, found other JSON")
    return data


def set_input(prompt: Prompt, registry: NodeRegistry, setting: str) -> None:
    """Apply a setting `NODE.INPUT=VALUE` in place; ValueError where it fits nothing in the prompt.

    NODE is a node's id, or its class or title where only one node has it; VALUE is read as the input's declared type.
    """
    target, equals, text = setting.partition("=")
    node_name, dot, name = target.rpartition(".")
    if not equals or not dot or not node_name or not name:
        raise ValueError(
            f"--set {setting}: expected NODE.INPUT=VALUE, such as 3.seed=7 or SaveImage.filename_prefix=cat"
        )
    node = prompt[_find_node(prompt, node_name)]
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or class_type not in registry:
        raise ValueError(f"--set {setting}: this host has no node {class_type}")
    declaration = registry.declarations()[class_type]
    spec = declaration.find(name)
    if spec is None:
        known = ", ".join(declaration.names()) or "none"
        raise ValueError(f"--set {setting}: {class_type} has no input {name!r}; its inputs are: {known}")
    try:
        node.setdefault("inputs", {})[name] = _parsed(spec, text)
    except ValueError as error:
        raise ValueError(f"--set {setting}: {error}") from None


def _find_node(prompt: Prompt, name: str) -> str:
    if name in prompt:
        return name
    for matches in (
        [node_id for node_id, node in prompt.items() if node.get("class_type") == name],
        [node_id for node_id, node in prompt.items() if title_of(node) == name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(
                f"--set: {len(matches)} nodes are called {name!r}; use one of the ids {', '.join(matches)}"
            )
    nodes = ", ".join(f"{node_id} ({node.get('class_type')})" for node_id, node in prompt.items())
    raise ValueError(f"--set: no node has the id, class or title {name!r}; the nodes are: {nodes}")


def title_of(node: dict[str, Any]) -> str | None:
    """The title that the graph's author gave a node, if any."""
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, dict) else None


def _parsed(spec: InputSpec, text: str) -> Any:
    if spec.choices is not None:
        # A value that is no choice is left to validation, since a node may accept more than it lists.
        return next((choice for choice in spec.choices if str(choice) == text), text)
    if spec.type == "STRING":
        return text
    if spec.type in ("INT", "FLOAT"):
        try:
            return int(text) if spec.type == "INT" else float(text)
        except ValueError:
            wanted = "a whole number" if spec.type == "INT" else "a number"
            raise ValueError(f"{text!r} is not {wanted}") from None
    if spec.type == "BOOLEAN":
        if text.lower() not in _TRUTH:
            raise ValueError(f"{text!r} is neither true nor false")
        return _TRUTH[text.lower()]
    raise ValueError(f"an input of type {spec.type} takes a link from another node, not a value")


def _prompt_of_picture(path: Path) -> tuple[Prompt, dict[str, Any]]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            chunks = dict(picture.info)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: this picture is damaged ({error})") from error
    if "prompt" not in chunks:
        raise ValueError(f"{path}: this picture carries no prompt; use one that ComfyUI or this program saved")
    prompt = _checked(path, _json(path, chunks["prompt"].encode()))
    if "workflow" not in chunks:
        return prompt, {}
    return prompt, {"extra_pnginfo": {"workflow": _json(path, chunks["workflow"].encode())}}


def _checked(path: Path, data: Any) -> Prompt:
    """`data` where it has the shape of a prompt, so that settings can be made in it before it is validated."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object of nodes in API format, found another kind of JSON")
    for node_id, node in data.items():
        if not isinstance(node, dict) or not isinstance(node.get("inputs", {}), dict):
            raise ValueError(f"{path}: {node_id!r} is not a node in API format, an object with class_type and inputs")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: this is not JSON ({error})") from error
