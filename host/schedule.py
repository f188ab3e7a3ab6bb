"""Which node runs next."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .graph import Prompt, links_of


class Schedule:
    """The nodes of a run that still have to be visited.

    Grows while it runs: the source of a lazy input joins when the node asks for it. Nodes whose outputs are cached
    never join, except as the outputs that the run is for.
    """

    def __init__(
        self,
        prompt: Prompt,
        outputs: Iterable[str],
        *,
        is_cached: Callable[[str], bool],
        is_lazy: Callable[[str, str], bool],
    ) -> None:
        self._prompt = prompt
        self._outputs = set(outputs)
        self._is_cached = is_cached
        self._is_lazy = is_lazy
        self._waiting_for: dict[str, set[str]] = {}  # node -> sources; in the order of joining
        self._needed_by: dict[str, set[str]] = {}
        for output in outputs:
            self._join(output)

    def __bool__(self) -> bool:
        return bool(self._waiting_for)

    def next(self) -> str:
        """A node whose sources are all there: outputs first, then what brings an output closest.

        So a preview is on the screen before the next long step begins.
        """
        ready = [node for node, sources in self._waiting_for.items() if not sources]
        return min(ready, key=self._steps_to_output)

    def require(self, node_id: str, source: str) -> None:
        """Let `node_id` wait for `source`."""
        if not self._is_cached(source):
            self._join(source)
            self._waiting_for[node_id].add(source)
            self._needed_by[source].add(node_id)

    def complete(self, node_id: str) -> None:
        """Take a node out; those that waited for it may run."""
        del self._waiting_for[node_id]
        for consumer in self._needed_by.pop(node_id):
            self._waiting_for[consumer].discard(node_id)

    def _join(self, node_id: str) -> None:
        entering = [node_id]
        while entering:
            current = entering.pop()
            if current in self._waiting_for:
                continue
            self._waiting_for[current] = set()
            self._needed_by.setdefault(current, set())
            for name, link in links_of(self._prompt[current]).items():
                if self._is_lazy(current, name) or self._is_cached(link.node):
                    continue
                entering.append(link.node)
                self._waiting_for[current].add(link.node)
                self._needed_by.setdefault(link.node, set()).add(current)

    def _steps_to_output(self, node_id: str) -> int:
        """0 for an output, 1 for a node that one waits for, 2 for a source of that, 3 for all others."""
        level = {node_id}
        for steps in range(3):
            if level & self._outputs:
                return steps
            level = {consumer for node in level for consumer in self._needed_by.get(node, ())}
        return 3
