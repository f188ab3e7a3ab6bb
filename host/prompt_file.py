"""Prompts from files, and single values set in them from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from .graph import Prompt, as_link, constant
from .registry import Declaration, InputSpec
from .validation import EDITOR_FORMAT, is_editor_format

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_TYPE_NAMES = {str: "STRING", int: "INT", float: "FLOAT", bool: "BOOLEAN"}


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


class Setting(NamedTuple):
    """`NODE.INPUT=VALUE`, read: the node's id in the prompt, its class, the input's name and the text of the value."""

    text: str
    node: str
    class_type: Any
    input: str
    value: str


def read_setting(prompt: Prompt, text: str) -> Setting:
    """Find what a setting `NODE.INPUT=VALUE` means; ValueError where it fits no node of the prompt.

    NODE is a node's id, or its class or title where only one node has it.
    """
    target, equals, value = text.partition("=")
    node_name, dot, name = target.rpartition(".")
    if not equals or not dot or not node_name or not name:
        raise ValueError(f"--set {text}: expected NODE.INPUT=VALUE, such as 3.seed=7 or SaveImage.filename_prefix=cat")
    node = _find_node(prompt, node_name)
    return Setting(text, node, prompt[node].get("class_type"), name, value)


def set_input(prompt: Prompt, setting: Setting, declaration: Declaration | None) -> None:
    """Make a setting in the prompt, in place; its value is read as the type that its class declares for the input.

    ValueError where it is not of that type, where there is no such input, and for a `declaration` of None, which stands
    for a class that is not known where the prompt shall run.
    """
    text, node, class_type, name, value = setting
    if declaration is None:
        raise ValueError(f"--set {text}: there is no node {class_type} where this graph shall run")
    spec = declaration.find(name)
    if spec is None:
        known = ", ".join(declaration.names()) or "none"
        raise ValueError(f"--set {text}: {class_type} has no input {name!r}; its inputs are: {known}")
    inputs = prompt[node].setdefault("inputs", {})
    try:
        inputs[name] = _parsed(spec, value, inputs.get(name))
    except ValueError as error:
        raise ValueError(f"--set {text}: {error}") from None


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


def _parsed(spec: InputSpec, text: str, present: Any) -> Any:
    """`text` as a value for an input that has the value `present` so far, None where it has none."""
    if spec.choices is not None:
        # A value that is no choice is left to validation, since a node may accept more than it lists.
        return next((choice for choice in spec.choices if str(choice) == text), text)
    kind = spec.type
    if kind not in _TYPE_NAMES.values() and as_link(present) is None:
        # Packs have types of their own for values too; what the graph holds then says what to read.
        kind = _TYPE_NAMES.get(type(constant(present)), kind)
    if kind == "STRING":
        return text
    if kind in ("INT", "FLOAT"):
        try:
            return int(text) if kind == "INT" else float(text)
        except ValueError:
            wanted = "a whole number" if kind == "INT" else "a number"
            raise ValueError(f"{text!r} is not {wanted}") from None
    if kind == "BOOLEAN":
        if text.lower() not in _TRUTH:
            raise ValueError(f"{text!r} is neither true nor false")
        return _TRUTH[text.lower()]
    raise ValueError(f"an input of type {kind} takes a link from another node, not a value")


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
