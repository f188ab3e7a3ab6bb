"""Writes one graph in the two forms that ComfyUI has: with places and sizes for the editor, bare for the API.

The editor stores widget values by position and sockets by number, so a workflow written by hand goes wrong silently
when a node gets an input. Here the order comes from the nodes themselves.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from ..host.registry import InputSpec, NodeRegistry

# Title and body of a node, of the editor's own palette, by the model that it loads or runs; as in web/js/cascade.js.
COLOURS = {
    "CASCADE_TEXT_ENCODER": ("#232", "#353"),
    "CASCADE_STAGE_C": ("#323", "#535"),
    "CASCADE_STAGE_B": ("#223", "#335"),
    "CASCADE_STAGE_A": ("#233", "#355"),
    "CASCADE_PREVIEWER": ("#432", "#653"),
    "CASCADE_LATENT_ENCODER": ("#2a363b", "#3f5159"),
    "CASCADE_IMAGE_ENCODER": ("#332922", "#593930"),
    "CASCADE_IP_ADAPTER": ("#332922", "#593930"),
    "CASCADE_CONTROLNET": ("#322", "#533"),
    "CASCADE_CONTROL": ("#322", "#533"),
    "CASCADE_FACES": ("#322", "#533"),
}
_NOTE_COLOURS = ("#222", "#000")
_GROUP_COLOURS = {"models": "#444", "text": "#8A8", "stage_c": "#a1309b", "stage_b": "#88A", "stage_a": "#8AA"}

_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
_TITLE, _ROW, _WIDGET, _PAD = 30, 20, 24, 16
# Below a node, for the line that it shows after a run.
_SAID = 104
_GAP, _GROUP_HEAD, _GROUP_PAD, _COLUMN_GAP = 36, 60, 14, 16


@dataclass(frozen=True)
class Node:
    """A node: `inputs` holds links `(node id, output number)` and the values that differ from the defaults.

    height: at least so much, for a text or a picture. said: keep room below, for what it shows after a run.
    models: files to name with their folder, as `(folder, path in the published repository or whole address)`.
    """

    id: int
    class_type: str
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    height: int = 0
    said: bool = False
    models: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Column:
    """A titled group of nodes, one below the other; without a title, just the nodes."""

    title: str
    nodes: tuple[Node, ...]
    colour: str = "models"
    width: int = 250


@dataclass(frozen=True)
class Shot:
    """A picture for the page of a task: what node `node` saves, shows or gives when the graph runs with `changes`.

    caption: below the picture. changes: node id -> inputs that differ from the workflow's. batch: show all pictures of
    a batch instead of its first.
    """

    caption: str
    node: int
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)
    batch: bool = False


@dataclass(frozen=True)
class Workflow:
    """A graph as columns from left to right, with a note (Markdown) at its left.

    shots: before and after, for the page that explains the task (`pictures.py` makes them).
    """

    name: str
    note: str
    columns: tuple[Column, ...]
    note_size: tuple[int, int] = (280, 560)
    shots: tuple[Shot, ...] = ()

    def nodes(self) -> list[Node]:
        return sorted((node for column in self.columns for node in column.nodes), key=lambda node: node.id)


class Writer:
    """Writes workflows of the nodes in `registry`. `version`: of this package, kept in the nodes for the editor."""

    def __init__(self, registry: NodeRegistry, version: str, repository: str) -> None:
        self._registry = registry
        self._declared = registry.declarations()
        self._version = version
        self._repository = repository

    def api(self, workflow: Workflow) -> dict[str, Any]:
        """The graph in API format, as the editor exports it: every input with its value."""
        graph = {}
        for node in workflow.nodes():
            self._check(node)
            values = {name: node.inputs.get(name, _default(spec)) for name, spec in self._widgets(node)}
            links = {name: _link(node.inputs[name]) for name in self._linked(node)}
            title = node.title or self._registry.title(node.class_type)
            graph[str(node.id)] = {
                "inputs": values | links,
                "class_type": node.class_type,
                "_meta": {"title": title},
            }
        return graph

    def outputs(self, class_type: str) -> tuple[str, ...]:
        """The types of what a node gives."""
        return tuple(self._registry[class_type].RETURN_TYPES)

    def editor(self, workflow: Workflow) -> dict[str, Any]:
        """The graph in the editor's format."""
        nodes = workflow.nodes()
        links, taken = self._links(nodes)
        placed, groups = self._places(workflow)
        order = {node_id: number for number, node_id in enumerate(_in_order(nodes))}
        entries = [self._entry(node, placed[node.id], order[node.id], taken, links) for node in nodes]
        note_id = max(node.id for node in nodes) + 1
        entries.append(_note(workflow, note_id, order=len(nodes)))
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"stable-cascade-nodes/{workflow.name}")),
            "revision": 0,
            "last_node_id": note_id,
            "last_link_id": len(links),
            "nodes": entries,
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _check(self, node: Node) -> None:
        unknown = node.inputs.keys() - set(self._declared[node.class_type].names())
        if unknown:
            raise ValueError(f"node {node.id}: {node.class_type} has no input {', '.join(sorted(unknown))}")

    def _specs(self, node: Node) -> list[tuple[str, InputSpec]]:
        declaration = self._declared[node.class_type]
        specs = ((name, declaration.find(name)) for name in declaration.names())
        return [(name, spec) for name, spec in specs if spec is not None]

    def _widgets(self, node: Node) -> list[tuple[str, InputSpec]]:
        return [(name, spec) for name, spec in self._specs(node) if spec.choices is not None or spec.type in _WIDGETS]

    def _sockets(self, node: Node) -> list[tuple[str, InputSpec]]:
        widgets = {name for name, _ in self._widgets(node)}
        return [(name, spec) for name, spec in self._specs(node) if name not in widgets]

    def _linked(self, node: Node) -> list[str]:
        """Inputs with a link: sockets, and widgets that take their value from another node."""
        names = (name for name, _ in (*self._sockets(node), *self._widgets(node)))
        return [name for name in names if isinstance(node.inputs.get(name), tuple)]

    def _links(self, nodes: list[Node]) -> tuple[list[list[Any]], dict[tuple[int, str], int]]:
        """All links as the editor has them, and the number of the link into each `(node, input)`."""
        by_id = {node.id: node for node in nodes}
        links: list[list[Any]] = []
        taken = {}
        for node in nodes:
            linked = self._linked(node)
            for slot, (name, _) in enumerate((*self._sockets(node), *self._widgets(node))):
                if name in linked:
                    source, output = node.inputs[name]
                    kind = self._registry[by_id[source].class_type].RETURN_TYPES[output]
                    links.append([len(links) + 1, source, output, node.id, slot, kind])
                    taken[node.id, name] = len(links)
        return links, taken

    def _height(self, node: Node) -> int:
        widgets = sum(1 + bool(spec.options.get("control_after_generate")) for _, spec in self._widgets(node))
        rows = max(len(self._sockets(node)), len(self._registry[node.class_type].RETURN_TYPES))
        return max(node.height, rows * _ROW + widgets * _WIDGET + _PAD)

    def _places(self, workflow: Workflow) -> tuple[dict[int, list[list[int]]], list[dict[str, Any]]]:
        """Node id -> [position, size], and the groups around them."""
        placed: dict[int, list[list[int]]] = {}
        groups: list[dict[str, Any]] = []
        left = workflow.note_size[0] + _COLUMN_GAP
        for column in workflow.columns:
            bottom = _GROUP_HEAD
            for node in column.nodes:
                height = self._height(node)
                placed[node.id] = [[left + _GROUP_PAD, bottom + _TITLE], [column.width, height]]
                bottom += _TITLE + height + _GAP + (_SAID if node.said else 0)
            width = column.width + 2 * _GROUP_PAD
            groups.append(
                {
                    "id": len(groups) + 1,
                    "title": column.title,
                    "bounding": [left, 0, width, bottom - _GAP + _GROUP_PAD],
                    "color": _GROUP_COLOURS[column.colour],
                    "font_size": 24,
                    "flags": {},
                }
            )
            left += width + _COLUMN_GAP
        return placed, groups

    def _entry(
        self,
        node: Node,
        place: list[list[int]],
        order: int,
        taken: dict[tuple[int, str], int],
        links: list[list[Any]],
    ) -> dict[str, Any]:
        node_class = self._registry[node.class_type]
        inputs = []
        for name, spec in self._sockets(node):
            entry = {"name": name, "type": spec.type, "link": taken.get((node.id, name))}
            inputs.append(entry if spec.required else {**entry, "shape": 7})
        for name, spec in self._widgets(node):
            kind = spec.type if spec.choices is None else "COMBO"
            entry = {"name": name, "type": kind, "widget": {"name": name}, "link": taken.get((node.id, name))}
            inputs.append(entry if spec.required else {**entry, "shape": 7})
        outputs = []
        names = getattr(node_class, "RETURN_NAMES", node_class.RETURN_TYPES)
        for slot, (name, kind) in enumerate(zip(names, node_class.RETURN_TYPES, strict=True)):
            going = [link[0] for link in links if link[1:3] == [node.id, slot]]
            outputs.append({"name": name, "type": kind, "links": going or None})
        own = self._registry.python_module(node.class_type) != "nodes"
        properties: dict[str, Any] = {
            "Node name for S&R": node.class_type,
            "cnr_id": "stable-cascade-nodes" if own else "comfy-core",
        }
        if own:
            properties["ver"] = self._version
        if node.models:
            properties["models"] = [
                {
                    "name": path.split("/")[-1],
                    "url": path if "://" in path else f"{self._repository}/{path}",
                    "directory": folder,
                }
                for folder, path in node.models
            ]
        entry = {
            "id": node.id,
            "type": node.class_type,
            "pos": place[0],
            "size": place[1],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": properties,
            "widgets_values": self._widget_values(node),
        }
        if node.title:
            entry["title"] = node.title
        colours = colours_of(self._registry[node.class_type])
        if colours:
            entry["color"], entry["bgcolor"] = colours
        return entry

    def _widget_values(self, node: Node) -> list[Any]:
        values = []
        for name, spec in self._widgets(node):
            given = node.inputs.get(name)
            # The editor keeps a value below a link too.
            values.append(_default(spec) if given is None or isinstance(given, tuple) else given)
            if spec.options.get("control_after_generate"):
                values.append("fixed")
        return values


def colours_of(node_class: type) -> tuple[str, str] | None:
    """Title and body by the first model among a node's outputs, else among its required inputs."""
    required = node_class.INPUT_TYPES().get("required", {}).values()
    types = [*node_class.RETURN_TYPES, *(spec[0] for spec in required if isinstance(spec[0], str))]
    return next((COLOURS[kind] for kind in types if kind in COLOURS), None)


def _default(spec: InputSpec) -> Any:
    return spec.options["default"] if "default" in spec.options else (spec.choices or [""])[0]


def _link(source: tuple[int, int]) -> list[Any]:
    return [str(source[0]), source[1]]


def _in_order(nodes: list[Node]) -> list[int]:
    """Ids so that every node comes after what it is linked to."""
    by_id = {node.id: node for node in nodes}
    done: dict[int, None] = {}

    def visit(node: Node) -> None:
        for value in node.inputs.values():
            if isinstance(value, tuple):
                visit(by_id[value[0]])
        done.setdefault(node.id)

    for node in nodes:
        visit(node)
    return list(done)


def _note(workflow: Workflow, note_id: int, order: int) -> dict[str, Any]:
    color, body = _NOTE_COLOURS
    return {
        "id": note_id,
        "type": "MarkdownNote",
        "pos": [0, _TITLE],
        "size": list(workflow.note_size),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Read me",
        "properties": {},
        "widgets_values": [workflow.note],
        "color": color,
        "bgcolor": body,
    }
