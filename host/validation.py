"""Checks a prompt before it runs, with ComfyUI's rules and error objects.

Constants are converted to the declared type, and the converted values are written back into the prompt. An output
whose branch is faulty is dropped and reported; the prompt is refused when no output is left.

Where ComfyUI answers with a server error (a link to a missing node, a cycle, JSON of another shape), the client gets
an error object like the others.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from .graph import Link, Prompt, as_link, constant, find_cycle, links_of, post_order, sources_in
from .invoke import constant_arguments, map_over_lists
from .problems import exception_name, problem, traceback_lines
from .registry import Declaration, Declarations, InputSpec, NodeRegistry

EDITOR_FORMAT = (
    "This is a workflow as the editor saves it, not a prompt.",
    "Export it with 'Workflow > Export (API)' in ComfyUI and use that file.",
)

# Longer combos are not quoted in full.
_LONGEST_QUOTED_COMBO = 20


@dataclass
class Verdict:
    """What validation found: `outputs` may run; `error` is None where there is at least one."""

    outputs: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)


def validate_prompt(prompt: Any, registry: NodeRegistry, targets: list[str] | None = None) -> Verdict:
    """Check `prompt` in place. `targets` limits it to some output nodes; None means all of them."""
    error = _shape_error(prompt, registry)
    if error is not None:
        return Verdict(error=error)
    outputs = [
        node_id
        for node_id, node in prompt.items()
        if getattr(registry[node["class_type"]], "OUTPUT_NODE", False) and (targets is None or node_id in targets)
    ]
    if not outputs:
        return Verdict(error=problem("prompt_no_outputs", "Prompt has no outputs"))
    cycle = find_cycle(outputs, sources_in(prompt))
    if cycle:
        path = " <- ".join(f"#{node_id}" for node_id in cycle)
        return Verdict(
            error=problem(
                "dependency_cycle", "Cannot execute because nodes depend on each other in a circle.", f"Node IDs {path}"
            )
        )
    return _PromptValidation(prompt, registry).verdict(outputs)


def is_editor_format(prompt: Any) -> bool:
    """Whether this is a workflow file of the graph editor instead of a prompt."""
    return isinstance(prompt, dict) and isinstance(prompt.get("nodes"), list)


def types_match(given: Any, wanted: Any) -> bool:
    """Whether an output of type `given` may be linked to an input of type `wanted`.

    A type may be several, joined by commas, of which one in common is enough; `*` is any.
    """
    # Packs make a wildcard of a str subclass that overrides != alone, so that is the operator to ask.
    if not given != wanted:  # noqa: SIM202
        return True
    if not isinstance(given, str) or not isinstance(wanted, str):
        # Two lists of choices must be equal; a list fits the newer way to declare a combo.
        return {_type_name(given), _type_name(wanted)} == {"LIST", "COMBO"}
    given_types = {name.strip() for name in given.split(",")}
    wanted_types = {name.strip() for name in wanted.split(",")}
    return "*" in given_types | wanted_types or bool(given_types & wanted_types)


def convert(value: Any, wanted: Any) -> Any:
    """`value` as the Python type of the input type `wanted`, as ComfyUI converts it (any text is true)."""
    conversion = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(_type_name(wanted))
    return value if conversion is None else conversion(value)


def _type_name(kind: Any) -> Any:
    # A combo has its choices in the place of a type, or is of type "COMBO" with the choices among its options.
    return "LIST" if isinstance(kind, (list, tuple)) else kind


def _shape_error(prompt: Any, registry: NodeRegistry) -> dict[str, Any] | None:
    if not isinstance(prompt, dict):
        return problem("invalid_prompt", "Cannot execute because the prompt is not an object of nodes.")
    if is_editor_format(prompt):
        return problem("invalid_prompt", *EDITOR_FORMAT)
    for node_id, node in prompt.items():
        place = f"Node ID '#{node_id}'"
        if not isinstance(node, dict):
            return problem("invalid_prompt", "Cannot execute because a node is not an object.", place)
        if "class_type" not in node:
            return problem("invalid_prompt", "Cannot execute because a node is missing the class_type property.", place)
        name = node["class_type"]
        if not isinstance(name, str) or name not in registry:
            return problem("invalid_prompt", f"Cannot execute because node {name} does not exist.", place)
        if not isinstance(node.get("inputs", {}), dict):
            return problem("invalid_prompt", "Cannot execute because a node's inputs are not an object.", place)
    return None


@dataclass
class _NodeReport:
    errors: list[dict[str, Any]]
    links: dict[str, Link]  # those that are sound, and so are followed
    valid: bool = True


class _PromptValidation:
    """One pass over the nodes that the outputs depend on."""

    def __init__(self, prompt: Prompt, registry: NodeRegistry) -> None:
        self._prompt = prompt
        self._registry = registry
        self._declarations: Declarations = registry.declarations()
        self._reports: dict[str, _NodeReport] = {}

    def verdict(self, outputs: list[str]) -> Verdict:
        verdict = Verdict()
        for output in outputs:
            self._validate(output)
            if self._reports[output].valid:
                verdict.outputs.append(output)
            else:
                self._collect_errors(output, verdict.node_errors)
        if not verdict.outputs:
            details = [
                f"{error['message']}: {error['details']}"
                for output in outputs
                for error in self._reports[output].errors
            ]
            verdict.error = problem(
                "prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(details)
            )
        return verdict

    def _validate(self, output: str) -> None:
        consumers: dict[str, tuple[str, str]] = {}  # which input of which node a node was first reached from

        def sources(node_id: str) -> list[str]:
            if node_id not in self._reports:
                self._reports[node_id] = self._report(node_id, consumers.get(node_id))
            links = self._reports[node_id].links
            for name, link in links.items():
                consumers.setdefault(link.node, (node_id, name))
            return [link.node for link in links.values()]

        for node_id in post_order([output], sources):
            report = self._reports[node_id]
            report.valid = not report.errors and all(self._reports[link.node].valid for link in report.links.values())

    def _collect_errors(self, output: str, node_errors: dict[str, dict[str, Any]]) -> None:
        def sources(node_id: str) -> list[str]:
            return [link.node for link in self._reports[node_id].links.values()]

        for node_id in post_order([output], sources):
            errors = self._reports[node_id].errors
            if errors:
                entry = node_errors.setdefault(
                    node_id,
                    {"errors": errors, "dependent_outputs": [], "class_type": self._prompt[node_id]["class_type"]},
                )
                entry["dependent_outputs"].append(output)

    def _report(self, node_id: str, consumer: tuple[str, str] | None) -> _NodeReport:
        try:
            return self._check(node_id)
        except Exception as error:  # raised by the node's own class as much as by odd values
            lines = traceback_lines(error)
            if consumer is None:
                found = problem(
                    "exception_during_validation",
                    "Exception when validating node",
                    str(error),
                    exception_type=exception_name(error),
                    traceback=lines,
                )
            else:
                user, name = consumer
                spec = self._declarations[self._prompt[user]["class_type"]].find(name)
                found = problem(
                    "exception_during_inner_validation",
                    "Exception when validating inner node",
                    str(error),
                    input_name=name,
                    input_config=None if spec is None else spec.config,
                    exception_message=str(error),
                    exception_type=exception_name(error),
                    traceback=lines,
                    linked_node=self._prompt[user]["inputs"][name],
                )
            return _NodeReport([found], {})

    def _check(self, node_id: str) -> _NodeReport:
        node = self._prompt[node_id]
        node_class = self._registry[node["class_type"]]
        declaration = self._declarations[node["class_type"]]
        inputs = node["inputs"]
        own = _OwnValidation(node_class)
        errors: list[dict[str, Any]] = []
        links: dict[str, Link] = {}
        received_types: dict[str, Any] = {}

        for name in declaration.names():
            spec = declaration.find(name)
            assert spec is not None
            if name not in inputs:
                if spec.required:
                    errors.append(problem("required_input_missing", "Required input is missing", name, input_name=name))
            elif isinstance(inputs[name], list):
                error = self._check_link(name, spec, inputs[name], own, received_types)
                if error is None:
                    links[name] = Link(*inputs[name])
                else:
                    errors.append(error)
            else:
                error = _convert_input(name, spec, inputs) or (
                    None if own.replaces_checks(name) else _range_error(name, spec, constant(inputs[name]))
                )
                if error is not None:
                    errors.append(error)
        # An input that the class does not declare is passed on when it is a link, so its source must be sound too.
        for name, link in links_of(node).items():
            if declaration.find(name) is None:
                if link.node not in self._prompt:
                    errors.append(_missing_node(name, link))
                else:
                    links[name] = link
        if not any(error["type"] == "required_input_missing" for error in errors):
            errors += own.errors(inputs, declaration, received_types)
        return _NodeReport(errors, links)

    def _check_link(
        self, name: str, spec: InputSpec, value: list[Any], own: _OwnValidation, received_types: dict[str, Any]
    ) -> dict[str, Any] | None:
        link = as_link(value)
        if link is None:
            return problem(
                "bad_linked_input",
                "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                name,
                input_name=name,
                input_config=spec.config,
                received_value=value,
            )
        if link.node not in self._prompt:
            return _missing_node(name, link)
        received = tuple(self._registry[self._prompt[link.node]["class_type"]].RETURN_TYPES)[link.slot]
        received_types[name] = received
        if own.checks_types or types_match(received, spec.type):
            return None
        return problem(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            f"{name}, received_type({received}) mismatch input_type({spec.type})",
            input_name=name,
            input_config=spec.config,
            received_type=received,
            linked_node=value,
        )


class _OwnValidation:
    """A class's `VALIDATE_INPUTS`: the arguments that it names are its own business, and so are link types."""

    def __init__(self, node_class: Any) -> None:
        self._function = getattr(node_class, "VALIDATE_INPUTS", None)
        self._takes_lists = bool(getattr(node_class, "INPUT_IS_LIST", False))
        parameters = inspect.signature(self._function).parameters if self._function else {}
        self._named = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        self._takes_any = len(self._named) < len(parameters)

    @property
    def checks_types(self) -> bool:
        return "input_types" in self._named

    def replaces_checks(self, name: str) -> bool:
        return self._takes_any or name in self._named

    def errors(
        self, inputs: dict[str, Any], declaration: Declaration, received_types: dict[str, Any]
    ) -> list[dict[str, Any]]:
        if self._function is None:
            return []
        arguments = constant_arguments(inputs, declaration, self._function)
        if self.checks_types:
            arguments["input_types"] = [received_types]
        answers = map_over_lists(self._function, arguments, takes_lists=self._takes_lists)
        return [
            problem(
                "custom_validation_failed",
                "Custom validation failed for node",
                name if answer is False else f"{name} - {answer}",
                input_name=name,
            )
            for name in arguments
            for answer in answers
            if answer is not True
        ]


def _missing_node(name: str, link: Link) -> dict[str, Any]:
    return problem(
        "bad_linked_input",
        "Bad linked input, the node it names is not in the prompt",
        f"{name}, node #{link.node}",
        input_name=name,
        received_value=list(link),
    )


def _convert_input(name: str, spec: InputSpec, inputs: dict[str, Any]) -> dict[str, Any] | None:
    value = constant(inputs[name])
    try:
        converted = convert(value, spec.type)
    except Exception as error:
        return problem(
            "invalid_input_type",
            f"Failed to convert an input value to a {spec.type} value",
            f"{name}, {value}, {error}",
            input_name=name,
            input_config=spec.config,
            received_value=value,
            exception_message=str(error),
        )
    # A list must stay wrapped, or it would read as a link from here on.
    inputs[name] = {"__value__": converted} if isinstance(converted, list) else converted
    return None


def _range_error(name: str, spec: InputSpec, value: Any) -> dict[str, Any] | None:
    options = spec.options
    if "min" in options and value < options["min"]:
        return problem(
            "value_smaller_than_min",
            f"Value {value} smaller than min of {options['min']}",
            name,
            input_name=name,
            input_config=spec.config,
            received_value=value,
        )
    if "max" in options and value > options["max"]:
        return problem(
            "value_bigger_than_max",
            f"Value {value} bigger than max of {options['max']}",
            name,
            input_name=name,
            input_config=spec.config,
            received_value=value,
        )
    choices = spec.choices
    # A combo of several values at once ("multiselect") sends a list; each of them must be a choice.
    if choices is not None and any(item not in choices for item in (value if isinstance(value, list) else [value])):
        long = len(choices) > _LONGEST_QUOTED_COMBO
        quoted = f"(list of length {len(choices)})" if long else str(choices)
        return problem(
            "value_not_in_list",
            "Value not in list",
            f"{name}: '{value}' not in {quoted}",
            input_name=name,
            input_config=None if long else spec.config,
            received_value=value,
        )
    return None
