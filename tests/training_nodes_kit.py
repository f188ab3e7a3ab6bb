"""Training nodes run by the embedded host on the bundled family, with pictures from a node and outputs kept."""

import json

import torch
from host_kit import graph, show
from PIL import Image

from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.host.pack import open_host

LOADERS = {
    "c": ("CascadeLoadStageC", {"file": "tiny (bundled)"}),
    "t": ("CascadeLoadTextEncoder", {"file": "tiny (bundled)"}),
    "e": ("CascadeLoadLatentEncoder", {"file": "tiny (bundled)"}),
    "i": ("CascadeLoadImageEncoder", {"file": "tiny (bundled)"}),
}
RUN = {"name": "mine", "steps": 3, "learning_rate": 2e-3, "batch_size": 1, "seed": 0, "resolution": 128}
MODELS = {"stage_c": ["c", 0], "text_encoder": ["t", 0], "latent_encoder": ["e", 0]}


def drawing(colour="orange", box=(30, 60, 120, 150), size=128):
    """A box on white, ``[H, W, 3]``, 0..1."""
    picture = Image.new("RGB", (size, size), "white")
    picture.paste(colour, tuple(side * size // 256 for side in box))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size, size, 3) / 255


class Pictures:
    """Gives a batch of drawings."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {"default": 1, "min": 1, "max": 8})}}

    def go(self, count):
        colours = ("orange", "teal", "navy", "olive")
        return (torch.stack([drawing(colours[number % 4]) for number in range(count)]),)


class TrainingHost:
    """Runs graphs around one training node, which has the id ``n``; `messages` has all that the host said."""

    def __init__(self, root):
        self.root, self.messages, self.kept, self.on_progress = root, [], [], None
        self.host = open_host(DataFolders(root), self._deliver)
        self.host.registry.add({"Pictures": Pictures, "Keep": show(self.kept)})
        # Collecting garbage takes longer than these trainings.
        self.rooms = []
        self.host.backend.make_room = lambda: self.rooms.append(len(self.messages))

    def _deliver(self, kind, data, client):
        self.messages.append((kind, data))
        if kind == "progress" and self.on_progress is not None:
            self.on_progress(data)

    def run(self, nodes, keep=()):
        """Run a graph; returns its status and the values of the outputs ``(id, slot)`` in `keep`."""
        self.messages.clear()
        self.kept.clear()
        ends = {f"k{number}": ("Keep", {"v": list(source)}) for number, source in enumerate(keep)}
        prompt = graph({**LOADERS, **nodes, **ends})
        status, answer = self.host.submit({"prompt": prompt, "client_id": "me"})
        assert status == 200 and not answer["node_errors"], json.dumps(answer)
        prompt_id = self.host.run_next()
        entry = self.host.history(prompt_id)[prompt_id]
        self.shown = entry["outputs"].get("n", {})
        values = dict(zip(self._kept_ids(), self.kept, strict=True))
        return entry["status"], [values.get(name) for name in ends]

    def _kept_ids(self):
        ran = [data["node"] for kind, data in self.messages if kind == "executing" and data["node"]]
        return [node for node in ran if node.startswith("k")]

    def train(self, node, keep=(), nodes=None, **inputs):
        """Run one training node on connected pictures; changes of its inputs by name, None leaves one out."""
        values = {**RUN, **MODELS, "pictures": ["p", 0], "captions": "an orange square on a white background"}
        if node == "CascadeTrainIPAdapter":
            values["image_encoder"] = ["i", 0]
        values = {name: value for name, value in {**values, **inputs}.items() if value is not None}
        graph = {"p": ("Pictures", {"count": 1}), "n": (node, values), **(nodes or {})}
        return self.run(graph, [("n", slot) if isinstance(slot, int) else slot for slot in keep])

    def trained(self, node, keep=(), nodes=None, **inputs):
        """The same, which must succeed; returns the kept values."""
        status, values = self.train(node, keep, nodes, **inputs)
        assert status["status_str"] == "success", status["messages"][-1]
        return values

    def refused(self, node, nodes=None, **inputs):
        """The same, which must fail; returns what the host says."""
        status, _ = self.train(node, (), nodes, **inputs)
        assert status["status_str"] == "error"
        kind, data = status["messages"][-1]
        assert kind == "execution_error" and data["node_id"] == "n", data
        assert data["exception_type"] in ("ValueError", "CheckpointError"), data
        return data["exception_message"].strip()

    def files(self, folder):
        found = (self.root / "models" / folder).glob("*")
        return sorted(path.name for path in found)


def sampling(stage_c, text_encoder, prompt, node_id="s"):
    """Nodes that sample a Stage C for three steps; its latent is output 0 of `node_id`."""
    return {
        f"{node_id}+": ("CascadeEncodeText", {"text_encoder": list(text_encoder), "text": prompt}),
        f"{node_id}-": ("CascadeEncodeText", {"text_encoder": list(text_encoder), "text": ""}),
        f"{node_id}0": ("CascadeEmptyLatent", {"stage_c": ["c", 0], "width": 128, "height": 128, "batch_size": 1}),
        node_id: (
            "CascadeSampleStageC",
            {
                "stage_c": list(stage_c),
                "positive": [f"{node_id}+", 0],
                "negative": [f"{node_id}-", 0],
                "latent": [f"{node_id}0", 0],
                "seed": 5,
                "steps": 3,
                "guidance": 2.0,
                "sampler": "ddim",
            },
        ),
    }


def write_folder(root, captions):
    """A folder of drawings below the input folder."""
    folder = root / "input" / "boxes"
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        picture = Image.new("RGB", (96 + 16 * number, 96), ("orange", "teal", "navy")[number])
        picture.save(folder / f"{number}.png")
        if caption:
            (folder / f"{number}.txt").write_text(caption)
    return folder
