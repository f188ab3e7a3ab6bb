"""What the pictures that the example workflows save must show."""

import re
from dataclasses import dataclass

import numpy as np
from editor import pixels
from PIL import Image

from stable_cascade_nodes.tiny.adapter_inputs import psnr_where
from stable_cascade_nodes.tiny.checker import read_picture
from stable_cascade_nodes.tiny.examples import FOLDER, scenes
from stable_cascade_nodes.tiny.looks import QUARTERS, has_look

# A prompt of the tiny family; any part may be left out.
WORDS = re.compile(
    r"(?:an? (?:(?P<size>small|large) )?(?:(?P<colour>\w+) )?(?P<shape>circle|square|triangle|star|cross|ring))?"
    r"(?: ?(?:on|at|in) the (?P<position>[a-z ]+?))?(?: ?(?:on )?an? (?P<background>\w+|\[\w+\]) background)?"
)
# What a word that a workflow teaches means to the pictures that it learns from.
LEARNED = {"[thing]": "yellow circle"}


@dataclass(frozen=True)
class Shows:
    """The picture has one object on one background, with all of these attributes.

    quarters: on the background that the tiny LoRA learned, which is read as objects of its two colours.
    """

    wanted: dict
    quarters: bool = False

    def __call__(self, picture):
        reading = read_picture(squared(pixels(picture)))
        found = [each for each in reading.objects if not (self.quarters and each.colour in QUARTERS)]
        assert len(found) == 1, reading
        seen = {"background": reading.background} | vars(found[0])
        assert {name: seen[name] for name in self.wanted} == self.wanted, reading


def squared(shown):
    """A picture made square by more of its border, for the reader would squeeze it."""
    missing = [max(shown.shape[:2]) - side for side in shown.shape[:2]]
    return np.pad(shown, [(side // 2, side - side // 2) for side in missing] + [(0, 0)], mode="edge")


def words(text):
    """What a prompt says."""
    for word, meaning in LEARNED.items():
        text = text.replace(word, meaning)
    found = WORDS.fullmatch(text)
    assert found and found.group(), f"{text!r} is no prompt that says what a picture shows"
    return {name: value for name, value in found.groupdict().items() if value and not value.startswith("[")}


@dataclass(frozen=True)
class Like:
    """The picture has these attributes of the example that node `node` of the graph gives."""

    node: str
    attributes: str

    def of(self, graph):
        scene = scenes()[graph[self.node]["inputs"]["picture"]]
        found = {"background": scene.background}
        found |= {key: getattr(scene.objects[0], key) for key in ("size", "colour", "shape", "position")}
        return {name: found[name] for name in self.attributes.split()}


@dataclass(frozen=True)
class Keeps:
    """The picture has, at `box` of it, the pixels of an example, outside of its transparent part.

    decibels: the peak signal-to-noise ratio at least.
    """

    name: str
    decibels: float
    box: tuple = (0, 0, 256, 256)

    def __call__(self, picture):
        with Image.open(FOLDER / f"{self.name}.png") as file:
            original = np.asarray(file.convert("RGBA"))
        found = pixels(picture.resize((256, 256), Image.Resampling.BOX).crop(self.box))
        assert found.shape[:2] == original.shape[:2]
        # Away from the border of the mask, which is feathered.
        where = np.asarray(Image.fromarray(original[..., 3]).resize(original.shape[1::-1])) == 255
        assert psnr_where(found[None], original[None, ..., :3], where[None]) > self.decibels


class Look:
    """The picture has the background that the tiny LoRA learned."""

    def __call__(self, picture):
        assert has_look(pixels(picture))


class Loss:
    """White paper with a blue line from the left of its axes to the right."""

    def __call__(self, picture):
        shown = pixels(picture).astype(int)
        blue = (shown[..., 2] - shown[..., 0] > 100).nonzero()[1]
        assert shown.shape == (400, 640, 3) and (shown.min(-1) > 240).mean() > 0.8
        assert blue.min() < 80 and blue.max() > 600


# Workflow, node that saves -> what its pictures must show beside what the prompt says. A prompt that says nothing of an
# object or a background leaves that to these.
MORE = {
    ("reconstruction", "13"): [Like("7", "size colour shape position background"), Keeps("circle", 25)],
    ("image_to_image", "14"): [Like("7", "size position")],
    ("inpaint", "20"): [Keeps("hole", 30)],
    ("outpaint", "20"): [Keeps("small", 25, (128, 64, 256, 192))],
    ("train_lora", "25"): [Loss()],
    ("canny", "26"): [Like("10", "size shape position")],
    ("super_resolution", "26"): [Like("10", "size shape position background")],
    ("face_identity", "26"): [Like("10", "size colour shape position")],
    ("image_variation", "16"): [Like("10", "size colour shape background")],
    ("ip_adapter", "16"): [Like("8", "background")],
    # The layout's picture, and the look of the style's object.
    ("ip_adapter_style_and_layout", "18"): [Like("8", "background"), Like("10", "colour shape")],
    ("lora", "12"): [Look()],
    ("lora_new_token", "12"): [Look()],
    ("combined", "22"): [Look(), Like("13", "shape position"), Like("17", "colour")],
}
# Which input of a node leads to the prompt that decided what its picture shows.
_TO_PROMPT = {
    "SaveImage": "images",
    "CascadeDecodeStageA": "latent",
    "CascadePreviewLatent": "latent",
    "CascadeSampleStageB": "latent",
    "CascadeSelectLatents": "latent",
    "CascadeSampleStageC": "positive",
    "CascadeImagePrompt": "conditioning",
}


def prompt_of(graph, node_id):
    """The text that decided what the pictures of a node show; empty where Stage C had no part in them."""
    node = graph[node_id]
    if node["class_type"] == "CascadeEncodeText":
        return node["inputs"]["text"]
    followed = _TO_PROMPT.get(node["class_type"])
    return prompt_of(graph, node["inputs"][followed][0]) if followed else ""


def checks_of(name, graph, node_id):
    """What is asked of the pictures of a node that saves: what its prompt says, and `MORE`."""
    more, text = MORE.get((name, node_id), []), prompt_of(graph, node_id)
    quarters = any(isinstance(check, Look) for check in more)
    wanted = [words(text)] if text else []
    wanted += [check.of(graph) for check in more if isinstance(check, Like)]
    checks = [Shows(each, quarters) for each in wanted]
    checks += [check for check in more if not isinstance(check, Like)]
    assert checks, f"{name}: nothing says what node {node_id} must show"
    return checks
