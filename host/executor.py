"""Runs validated prompts and tells a client about it in ComfyUI's messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from .cache import RunCache
from .graph import Prompt, constant, links_of
from .invoke import Lists, accepted, hidden_arguments, map_over_lists, split_results
from .problems import exception_message, exception_name, traceback_lines
from .progress import NodeProgress, running
from .registry import NodeRegistry
from .schedule import Schedule
from .signals import ExecutionBlocker, RunInterrupted

# Characters of an input that is no plain value, in the report of a failed node.
_LONGEST_SHOWN_INPUT = 2000

# Receives a message: its type, its data, and the client it is for (None: everybody).
Deliver = Callable[[str, dict[str, Any], str | None], None]


class Executor:
    """Executes one prompt at a time and keeps outputs for the next."""

    def __init__(self, registry: NodeRegistry, deliver: Deliver) -> None:
        self._registry = registry
        self._deliver = deliver
        self.cache = RunCache(registry)
        self._interrupted = threading.Event()

    def interrupt(self) -> None:
        """Stop the run at its next node or progress report; may be called from any thread."""
        self._interrupted.set()

    def rearm(self) -> None:
        """Forget an interruption; a host does so when it takes the next prompt, and not while it interrupts one."""
        self._interrupted.clear()

    def execute(self, prompt_id: str, prompt: Prompt, outputs: list[str], extra_data: dict[str, Any]) -> dict[str, Any]:
        """Run the output nodes `outputs` of a validated prompt.

        Returns the `outputs`, `meta` and `status` of a history entry. A failing node ends the run, not the host.
        """
        return _Run(self, prompt_id, prompt, outputs, extra_data).execute()

    def check_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise RunInterrupted


class DynamicPrompt:
    """What nodes that ask for `DYNPROMPT` may look up."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt

    def get_original_prompt(self) -> Prompt:
        return self._prompt

    def get_node(self, node_id: str) -> dict[str, Any]:
        return self._prompt[node_id]

    def has_node(self, node_id: str) -> bool:
        return node_id in self._prompt

    def all_node_ids(self) -> set[str]:
        return set(self._prompt)

    def get_real_node_id(self, node_id: str) -> str:
        return node_id

    def get_display_node_id(self, node_id: str) -> str:
        return node_id

    def get_parent_node_id(self, node_id: str) -> None:
        return None


class _Run:
    """One prompt on its way through the executor."""

    def __init__(
        self, executor: Executor, prompt_id: str, prompt: Prompt, outputs: list[str], extra_data: dict[str, Any]
    ) -> None:
        self._executor = executor
        self._registry = executor._registry
        self._cache = executor.cache
        self._deliver = executor._deliver
        self._prompt_id = prompt_id
        self._prompt = prompt
        self._dynamic_prompt = DynamicPrompt(prompt)
        self._extra_data = extra_data
        self._client = extra_data.get("client_id")
        self._outputs = outputs
        self._declarations = self._registry.declarations()
        self._progress = NodeProgress(
            prompt_id, lambda kind, data: self._deliver(kind, data, self._client), executor.check_interrupted
        )
        self._messages: list[tuple[str, dict[str, Any]]] = []
        self._executed: list[str] = []

    def execute(self) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            try:
                success = self._execute()
            except Exception as error:  # outside of a node's own work: all that can be named is what was asked for
                self._tell("execution_error", self._failure(self._outputs[0], _Step(), error))
                success = False
        shown = {node_id: self._cache.shown(node_id) for node_id in self._prompt}
        shown = {node_id: value for node_id, value in shown.items() if value is not None}
        return {
            "outputs": shown,
            "meta": {
                node_id: {
                    "node_id": node_id,
                    "display_node": node_id,
                    "parent_node": None,
                    "real_node_id": node_id,
                }
                for node_id in shown
            },
            "status": {
                "status_str": "success" if success else "error",
                "completed": success,
                "messages": self._messages,
            },
        }

    def _execute(self) -> bool:
        self._tell("execution_start", {"prompt_id": self._prompt_id})
        self._cache.begin(self._prompt, self._declarations)
        cached = [node_id for node_id in self._prompt if self._cache.outputs(node_id) is not None]
        self._tell("execution_cached", {"nodes": cached, "prompt_id": self._prompt_id})
        schedule = Schedule(
            self._prompt,
            self._outputs,
            is_cached=lambda node_id: self._cache.outputs(node_id) is not None,
            is_lazy=self._is_lazy,
        )
        while schedule:
            node_id = schedule.next()
            step = _Step()
            try:
                with running(node_id, self._progress):
                    wanted = self._visit(node_id, step)
            except RunInterrupted:
                self._tell(
                    "execution_interrupted",
                    {
                        "prompt_id": self._prompt_id,
                        "node_id": node_id,
                        "node_type": self._prompt[node_id]["class_type"],
                        "executed": list(self._executed),
                    },
                    broadcast=True,
                )
                return False
            except (Exception, SystemExit) as error:  # a node that calls exit() must not end the host
                self._tell("execution_error", self._failure(node_id, step, error))
                return False
            for source in wanted:
                schedule.require(node_id, source)
            if not wanted:
                schedule.complete(node_id)
        self._tell("execution_success", {"prompt_id": self._prompt_id})
        return True

    def _visit(self, node_id: str, step: _Step) -> list[str]:
        """Execute a node, or return the sources of lazy inputs that it asks for first."""
        node = self._prompt[node_id]
        if self._cache.outputs(node_id) is not None:
            self._show(node_id)
            self._progress.finish(node_id)
            return []

        node_class = self._registry[node["class_type"]]
        takes_lists = bool(getattr(node_class, "INPUT_IS_LIST", False))
        self._progress.start(node_id)
        step.arguments, missing = self._gather(node_id)
        if self._client is not None:
            message = {"node": node_id, "display_node": node_id, "prompt_id": self._prompt_id}
            self._deliver("executing", message, self._client)
        instance = self._cache.node_object(node_id, node["class_type"])

        if missing and hasattr(instance, "check_lazy_status"):
            wanted = self._lazy_sources(node_id, instance, step.arguments, missing, takes_lists)
            if wanted:
                return wanted
        results = map_over_lists(
            getattr(instance, node_class.FUNCTION),
            step.arguments,
            takes_lists=takes_lists,
            on_block=lambda blocker: self._blocked(node_id, blocker),
            before=self._executor.check_interrupted,
        )
        outputs, shown = split_results(results, node_class)
        self._cache.store(node_id, outputs, shown)
        self._show(node_id)
        self._progress.finish(node_id)
        self._executed.append(node_id)
        return []

    def _gather(self, node_id: str) -> tuple[Lists, dict[str, str]]:
        """A node's arguments as lists; and, by name, the sources of those that are not there yet (None for now)."""
        node = self._prompt[node_id]
        declaration = self._declarations[node["class_type"]]
        links = links_of(node)
        arguments: Lists = {}
        missing: dict[str, str] = {}
        for name, value in node["inputs"].items():
            if name not in links:
                if declaration.find(name) is not None:
                    arguments[name] = [constant(value)]
                continue
            source, slot = links[name]
            outputs = self._cache.outputs(source)
            if outputs is None:
                missing[name] = source
                arguments[name] = [None]
            elif slot < len(outputs):
                arguments[name] = outputs[slot]
            else:
                raise ValueError(
                    f"input {name!r} is linked to output {slot} of node #{source} "
                    f"({self._prompt[source]['class_type']}), which returned {len(outputs)} outputs"
                )
        arguments |= hidden_arguments(
            node_id,
            declaration,
            prompt=self._prompt,
            dynamic_prompt=self._dynamic_prompt,
            extra_data=self._extra_data,
        )
        return arguments, missing

    def _is_lazy(self, node_id: str, name: str) -> bool:
        spec = self._declarations[self._prompt[node_id]["class_type"]].find(name)
        return spec is not None and spec.lazy

    def _lazy_sources(
        self, node_id: str, instance: Any, arguments: Lists, missing: dict[str, str], takes_lists: bool
    ) -> list[str]:
        function = instance.check_lazy_status
        answers = map_over_lists(
            function,
            accepted(arguments, function),
            takes_lists=takes_lists,
            before=self._executor.check_interrupted,
        )
        names = {name for answer in answers if isinstance(answer, (list, tuple, set)) for name in answer}
        return list(dict.fromkeys(source for name, source in missing.items() if name in names))

    def _blocked(self, node_id: str, blocker: ExecutionBlocker) -> ExecutionBlocker:
        if blocker.message is None:
            return blocker
        if self._client is not None:
            message = {
                "prompt_id": self._prompt_id,
                "node_id": node_id,
                "node_type": self._prompt[node_id]["class_type"],
                "executed": list(self._executed),
                "exception_message": f"Execution Blocked: {blocker.message}",
                "exception_type": "ExecutionBlocked",
                "traceback": [],
                "current_inputs": [],
                "current_outputs": [],
            }
            self._deliver("execution_error", message, self._client)
        return ExecutionBlocker(None)  # told once; what hangs on this node stays silent

    def _show(self, node_id: str) -> None:
        shown = self._cache.shown(node_id)
        if shown is not None and self._client is not None:
            message = {"node": node_id, "display_node": node_id, "output": shown, "prompt_id": self._prompt_id}
            self._deliver("executed", message, self._client)

    def _failure(self, node_id: str, step: _Step, error: BaseException) -> dict[str, Any]:
        return {
            "prompt_id": self._prompt_id,
            "node_id": node_id,
            "node_type": self._prompt[node_id]["class_type"],
            "executed": list(self._executed),
            "exception_message": f"{exception_message(error)}\n",
            "exception_type": exception_name(error),
            "traceback": traceback_lines(error),
            "current_inputs": {
                name: [_printable(value) for value in values] for name, values in step.arguments.items()
            },
            "current_outputs": list(self._prompt),
        }

    def _tell(self, kind: str, data: dict[str, Any], *, broadcast: bool = False) -> None:
        """Send a message that also belongs into the history."""
        data = {**data, "timestamp": int(time.time() * 1000)}
        self._messages.append((kind, data))
        if broadcast or self._client is not None:
            self._deliver(kind, data, None if broadcast else self._client)


class _Step:
    """What is known of the node that runs, for the report if it fails."""

    def __init__(self) -> None:
        self.arguments: Lists = {}


def _printable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return str(value)[:_LONGEST_SHOWN_INPUT]
    except Exception:  # the report of a failure must not fail over it
        return f"<{type(value).__name__}>"
