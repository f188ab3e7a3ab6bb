"""Nodes called by hand, on a backend that remembers what it was asked."""

import torch

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.nodes import bridge, runtime

ALL_NODES = NODE_CLASS_MAPPINGS | bridge.NODE_CLASS_MAPPINGS


class Bar:
    def __init__(self, backend, total):
        self.backend, self.total = backend, total

    def update(self, value, preview=None):
        self.backend.seen.append((value, self.total, preview))
        if self.backend.stop_at == value:
            raise KeyboardInterrupt


class TestBackend(runtime.PlainBackend):
    """Models in one folder; remembers progress, and stops a run where it is told to."""

    __test__ = False

    def __init__(self, root, device="cpu"):
        self.root, self.seen, self.stop_at, self.placings, self.previews = root, [], None, [], False
        self._device = torch.device(device)

    def device(self, stage):
        return self._device

    def progress(self, total):
        return Bar(self, total)

    def model_files(self, folder):
        return runtime.list_models([self.root], folder)

    def model_path(self, folder, name):
        return runtime.find_model([self.root], folder, name)

    def placed(self, handles, memory):
        self.placings.append(([handle.stage for handle in handles], memory))
        return super().placed(handles, memory)

    def shows_previews(self):
        return self.previews


def run(name, **inputs):
    node = NODE_CLASS_MAPPINGS[name]
    answer = getattr(node(), node.FUNCTION)(**inputs)
    return answer if isinstance(answer, dict) else {"ui": {}, "result": answer}


def load(name, **inputs):
    return run(name, **({"file": "auto"} | inputs))["result"][0]


def sample_c(host, **changes):
    encoder = load("CascadeLoadTextEncoder")
    encode = {text: run("CascadeEncodeText", text_encoder=encoder, text=text)["result"][0] for text in ("red", "")}
    stage_c = changes.pop("stage_c", None) or load("CascadeLoadStageC")
    latent = run("CascadeEmptyLatent", stage_c=stage_c, width=100, height=60, batch_size=1)["result"][0]
    inputs = {
        "stage_c": stage_c,
        "positive": encode["red"],
        "negative": encode[""],
        "latent": latent,
        "seed": 1,
        "steps": 2,
        "guidance": 0.0,
        "sampler": "ddpm",
    }
    return run("CascadeSampleStageC", **inputs | changes), inputs


def sample_b(host, **changes):
    first, inputs = sample_c(host)
    inputs = inputs | {"latent": first["result"][0], "stage_b": load("CascadeLoadStageB")}
    inputs.pop("stage_c")
    return run("CascadeSampleStageB", **inputs | changes), inputs
