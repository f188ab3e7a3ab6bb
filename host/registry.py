"""The node classes that a host knows, and what they declare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class InputSpec(NamedTuple):
    """One declared input of a node."""

    type: Any  # a type name, or the list of choices of a combo
    options: dict[str, Any]
    required: bool

    @property
    def config(self) -> list[Any]:
        """`[type, options]`, the form in which messages quote it."""
        return [self.type, self.options]

    @property
    def choices(self) -> list[Any] | None:
        """The values a combo offers; None for any other type."""
        if isinstance(self.type, (list, tuple)):
            return list(self.type)
        if self.type == "COMBO":
            return list(self.options.get("options", []))
        return None

    @property
    def lazy(self) -> bool:
        return bool(self.options.get("lazy"))


class Declaration:
    """The inputs that a class declares: what its `INPUT_TYPES()` gives, or `/object_info` under `input`."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self._required = inputs.get("required", {})
        self._optional = inputs.get("optional", {})
        self.hidden: dict[str, str] = {name: _hidden_kind(kind) for name, kind in inputs.get("hidden", {}).items()}

    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._required, *self._optional]))

    def find(self, name: str) -> InputSpec | None:
        # Not an iteration: packs exist whose optional inputs are an object that accepts any name.
        for inputs, required in ((self._required, True), (self._optional, False)):
            if name in inputs:
                entry = inputs[name]
                return InputSpec(entry[0], entry[1] if len(entry) > 1 else {}, required)
        return None


class NodeRegistry:
    """Node classes by id, with their titles and the module that the frontend files them under."""

    def __init__(self) -> None:
        self.classes: dict[str, Any] = {}
        self._titles: dict[str, str] = {}
        self._modules: dict[str, str] = {}

    def add(
        self, classes: Mapping[str, Any], titles: Mapping[str, str] | None = None, *, python_module: str = "nodes"
    ) -> None:
        """Register node classes; an id that is taken is a ValueError."""
        for name, node_class in classes.items():
            if name in self.classes:
                raise ValueError(
                    f"node id {name!r} is registered twice, by {self._modules[name]} and {python_module}; rename one"
                )
            self.classes[name] = node_class
            self._modules[name] = python_module
            self._titles[name] = (titles or {}).get(name, name)

    def __contains__(self, name: object) -> bool:
        return name in self.classes

    def __getitem__(self, name: str) -> Any:
        return self.classes[name]

    def title(self, name: str) -> str:
        return self._titles[name]

    def python_module(self, name: str) -> str:
        return self._modules[name]

    def declarations(self) -> Declarations:
        return Declarations(self)


class Declarations:
    """Declarations of one prompt's classes: `INPUT_TYPES()` may list folders, so each class is asked once."""

    def __init__(self, registry: NodeRegistry) -> None:
        self._registry = registry
        self._known: dict[str, Declaration] = {}

    def __getitem__(self, class_type: str) -> Declaration:
        if class_type not in self._known:
            self._known[class_type] = Declaration(self._registry[class_type].INPUT_TYPES())
        return self._known[class_type]

    def get(self, class_type: object) -> Declaration | None:
        """None for a class that is not registered."""
        return self[class_type] if isinstance(class_type, str) and class_type in self._registry else None


def _hidden_kind(kind: Any) -> str:
    return kind[0] if isinstance(kind, (list, tuple)) else kind
