"""Every file in `workflows/`: opened in the real editor, exported there, run, and its pictures looked at."""

import re
from pathlib import Path

import pytest
from editor import ROOT, pixels, read_json
from PIL import Image

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops.catalog import STAGE_FOLDERS
from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.host.pack import open_host
from stable_cascade_nodes.tiny.checker import read_picture
from stable_cascade_nodes.workflows.graphs import WORKFLOWS
from stable_cascade_nodes.workflows.layout import Column, Node, Workflow, Writer
from stable_cascade_nodes.workflows.thumbnails import thumbnail
from stable_cascade_nodes.workflows.write import written

FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
WORDS = re.compile(
    r"an? (?:(?P<size>small|large) )?(?P<colour>\w+) (?P<shape>circle|square|triangle|star|cross|ring)"
    r"(?: (?:on|at|in) the (?P<place>[a-z ]+?))? on an? (?P<background>\w+) background"
)


# What a word that a workflow teaches means to the pictures that it learns from.
LEARNED = {"[thing]": "yellow circle"}


def nodes_of(name):
    return read_json(FOLDER / f"{name}.json")["nodes"]


def prompt_of(graph, node_id):
    """The text that decided what the node's picture shows: that of the sampler of Stage C nearest to it."""
    node = graph[node_id]
    if node["class_type"] == "CascadeSampleStageC":
        text = graph[node["inputs"]["positive"][0]]["inputs"]["text"]
        for word, meaning in LEARNED.items():
            text = text.replace(word, meaning)
        return text
    for name in ("images", "latent"):
        if name in node["inputs"]:
            return prompt_of(graph, node["inputs"][name][0])
    raise AssertionError(f"no sampler of Stage C before node {node_id}")


def assert_shows(picture, prompt):
    """The picture has one object, and it and its background are what the prompt says."""
    wanted = WORDS.fullmatch(prompt).groupdict()
    reading = read_picture(pixels(picture))
    (found,) = reading.objects
    seen = {"size": found.size, "colour": found.colour, "shape": found.shape, "place": found.position}
    seen["background"] = reading.background
    assert {key: seen[key] for key, value in wanted.items() if value} == {k: v for k, v in wanted.items() if v}


def is_loss(graph, node_id):
    """Whether a node saves the picture of a loss."""
    return graph[graph[node_id]["inputs"]["images"][0]]["class_type"].startswith("CascadeTrain")


def assert_is_loss(picture):
    """White paper with a blue line from the left of its axes to the right."""
    shown = pixels(picture).astype(int)
    blue = (shown[..., 2] - shown[..., 0] > 100).nonzero()[1]
    assert shown.shape == (400, 640, 3) and (shown.min(-1) > 240).mean() > 0.8
    assert blue.min() < 80 and blue.max() > 600


def assert_placed(nodes, saved):
    """Sockets, widgets, links and sizes in the file are where the editor itself puts them."""
    saved = {str(node["id"]): node for node in saved}
    for node in nodes:
        other = saved[str(node["id"])]
        for key in ("inputs", "outputs"):
            sockets = [(socket["name"], socket.get("link")) for socket in node[key]]
            assert sockets == [(socket["name"], socket.get("link")) for socket in other[key]]
        assert node["widgets_values"] == (other.get("widgets_values") or [])
        assert node["size"] == pytest.approx(other["size"], abs=1)


def without_versions(graph):
    """An exported graph without what newer editors add about packs and their versions."""
    return {key: {**node, "_meta": {"title": node["_meta"]["title"]}} for key, node in graph.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_opens_exports_and_runs_it(editor, name):
    twin = read_json(FOLDER / "api" / f"{name}.json")
    editor.open(name)
    assert editor.ask("app.graph.nodes.filter((node) => !(node.type in LiteGraph.registered_node_types)).length") == 0
    assert editor.page.get_by_role("dialog").count() == 0
    assert editor.overlaps() == []
    assert without_versions(editor.exported()) == twin
    assert_placed(nodes_of(name), editor.serialized()["nodes"])
    editor.run()
    saved = [key for key, node in twin.items() if node["class_type"] == "SaveImage"]
    assert saved
    for key in saved:
        for picture in editor.pictures(key):
            if is_loss(twin, key):
                assert_is_loss(picture)
            else:
                assert_shows(picture, prompt_of(twin, key))
    assert editor.overlaps() == []
    editor.shot(f"workflow_{name}")


def test_the_files_are_what_their_descriptions_say():
    files = written()
    assert {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.json")} == files.keys()
    assert len(WORKFLOWS) == len(NAMES) >= 4
    for name, content in files.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == content, f"run workflows.write: {name} is out of date"


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_thumbnail_of_its_own_picture(name):
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 100_000
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert max(picture.size) == 512
        graph = read_json(FOLDER / "api" / f"{name}.json")
        saves = [key for key in graph if graph[key]["class_type"] == "SaveImage" and not is_loss(graph, key)]
        # The first picture of a sheet is the first that the workflow saves.
        sheet = len(saves) > 1 or any(node["inputs"].get("batch_size", 1) > 1 for node in graph.values())
        first = picture.crop((0, 0, 256, 256)) if sheet else picture
        assert_shows(first, prompt_of(graph, saves[0]))


def test_thumbnails_show_up_to_four_pictures():
    colours = ("red", "lime", "blue", "white", "black")
    pictures = [Image.new("RGB", (40, 20), colour) for colour in colours]
    assert thumbnail(pictures[:1]).size == (512, 512)
    sheet = thumbnail(pictures)
    centres = [(128, 128), (384, 128), (128, 384), (384, 384)]
    assert [sheet.getpixel(centre) for centre in centres] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


@pytest.mark.parametrize("name", NAMES)
def test_loaders_name_the_published_files_and_their_folders(name):
    loaders = [node for node in nodes_of(name) if node["type"].startswith("CascadeLoad")]
    assert loaders
    published = published_files()
    for node in loaders:
        models = node["properties"]["models"]
        assert models
        for model in models:
            assert model.keys() == {"name", "url", "directory"}
            path = model["url"].removeprefix("https://huggingface.co/stabilityai/stable-cascade/resolve/main/")
            assert path in published
            assert path.split("/")[-1] == model["name"]
            assert model["directory"] in folders_of(node["type"])


def published_files():
    stages = ("stage_c", "stage_c_lite", "stage_b", "stage_b_lite")
    return {
        *(f"{stage}{kind}.safetensors" for stage in stages for kind in ("", "_bf16")),
        "stage_a.safetensors",
        "previewer.safetensors",
        "effnet_encoder.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/model.bf16.safetensors",
        "comfyui_checkpoints/stable_cascade_stage_b.safetensors",
        "comfyui_checkpoints/stable_cascade_stage_c.safetensors",
    }


def folders_of(class_type):
    """The folders that a loader lists."""
    stage = getattr(NODE_CLASS_MAPPINGS[class_type], "STAGE", None)
    return ("checkpoints",) if stage is None else STAGE_FOLDERS[stage]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_say_which_pack_they_are_from(name):
    for node in nodes_of(name):
        if node["type"] in NODE_CLASS_MAPPINGS:
            assert node["properties"]["cnr_id"] == "stable-cascade-nodes"
            assert node["properties"]["ver"] == version()


def version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1)


def test_a_description_with_an_input_that_no_node_has_is_refused():
    writer = Writer(open_host(DataFolders(Path())).registry, "0", "https://example.invalid")
    column = (Node(1, "CascadeLoadStageC", {"files": "auto"}),)
    with pytest.raises(ValueError, match="CascadeLoadStageC has no input files"):
        writer.api(Workflow("odd", "", (Column("", column),)))
