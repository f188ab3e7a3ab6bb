"""Nodes made from functions, and a host to run graphs of them on."""

import pytest

from stable_cascade_nodes.host import Host
from stable_cascade_nodes.host.folders import DataFolders

INT = ("INT", {"forceInput": True})


def node(function, required=None, returns=("*",), *, optional=None, hidden=None, **attributes):
    """A node class around `function(self, **inputs)`."""
    inputs = {"required": required or {}, "optional": optional or {}, "hidden": hidden or {}}
    return type(
        "Node",
        (),
        {
            "INPUT_TYPES": classmethod(lambda cls: inputs),
            "RETURN_TYPES": returns,
            "FUNCTION": "go",
            "CATEGORY": "test",
            "go": function,
            **attributes,
        },
    )


def show(shown):
    """An output node that appends what it is given to `shown`."""
    return node(lambda self, v: shown.append(v) or {"ui": {"v": [repr(v)]}}, {"v": ("*",)}, (), OUTPUT_NODE=True)


def counting(calls, required=None, **attributes):
    """A node that appends its inputs to `calls` and gives how often it ran."""
    return node(lambda self, **inputs: (calls.append(inputs) or len(calls),), required, **attributes)


class Bench:
    """A host with some nodes, and everything it says."""

    def __init__(self, folder, **classes):
        self.messages = []
        self.shown = []
        self.host = Host(DataFolders(folder), lambda kind, data, client: self.messages.append((kind, data)))
        self.host.registry.add({"Show": show(self.shown), **classes})

    def run(self, prompt, **body):
        self.messages.clear()
        self.shown.clear()
        status, answer = self.host.submit({"prompt": graph(prompt), "client_id": "me", **body})
        assert status == 200, answer
        prompt_id = self.host.run_next()
        return self.host.history(prompt_id)[prompt_id]

    def executing(self):
        return [data["node"] for kind, data in self.messages if kind == "executing" and data["node"] is not None]

    def error(self):
        return next(data for kind, data in self.messages if kind == "execution_error")


def graph(nodes):
    """`{"1": ("Class", {inputs})}` in API format."""
    return {node_id: {"class_type": name, "inputs": inputs} for node_id, (name, inputs) in nodes.items()}


@pytest.fixture
def bench(tmp_path):
    return lambda **classes: Bench(tmp_path, **classes)
