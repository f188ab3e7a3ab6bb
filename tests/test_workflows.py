"""Every file in `workflows/`: opened in the real editor, exported there, run, and its pictures looked at."""

import re
from pathlib import Path

import pytest
from editor import ROOT, read_json
from PIL import Image
from workflow_checks import MORE, checks_of

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops.catalog import STAGE_FOLDERS
from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.host.pack import open_host
from stable_cascade_nodes.workflows.graphs import WORKFLOWS
from stable_cascade_nodes.workflows.layout import Column, Node, Workflow, Writer
from stable_cascade_nodes.workflows.thumbnails import thumbnail
from stable_cascade_nodes.workflows.write import written

FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def nodes_of(name):
    return read_json(FOLDER / f"{name}.json")["nodes"]


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
        checks = checks_of(name, twin, key)
        for picture in editor.pictures(key):
            for check in checks:
                check(picture)
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
        saves = [key for key, node in graph.items() if node["class_type"] == "SaveImage"]
        # The first picture of a sheet is the first that the workflow saves.
        sheet = len(saves) > 1 or any(node["inputs"].get("batch_size", 1) > 1 for node in graph.values())
        first = picture.crop((0, 0, 256, 256)) if sheet else picture
        for check in checks_of(name, graph, min(saves, key=int)):
            check(first)


def test_more_is_asked_of_pictures_that_are_there():
    saves = {
        (path.stem, key)
        for path in (FOLDER / "api").glob("*.json")
        for key, node in read_json(path).items()
        if node["class_type"] == "SaveImage"
    }
    assert not MORE.keys() - saves


def test_thumbnails_show_up_to_four_pictures():
    colours = ("red", "lime", "blue", "white", "black")
    pictures = [Image.new("RGB", (40, 20), colour) for colour in colours]
    assert thumbnail(pictures[:1]).size == (512, 256)
    sheet = thumbnail(pictures)
    centres = [(128, 128), (384, 128), (128, 384), (384, 384)]
    assert [sheet.getpixel(centre) for centre in centres] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


@pytest.mark.parametrize("name", NAMES)
def test_loaders_name_the_published_files_and_their_folders(name):
    loaders = [node for node in nodes_of(name) if node["type"].startswith("CascadeLoad")]
    assert loaders
    published = published_files()
    for node in loaders:
        models = node["properties"].get("models", [])
        assert models or unpublished(node)
        for model in models:
            assert model.keys() == {"name", "url", "directory"}
            path = model["url"].removeprefix("https://huggingface.co/stabilityai/")
            path = path.removeprefix("stable-cascade/resolve/main/")
            assert path in published
            assert path.split("/")[-1] == model["name"]
            assert model["directory"] in folders_of(node["type"])


def unpublished(node):
    """Whether there is no published file that a loader could name."""
    return node["type"] in ("CascadeLoadLoRA", "CascadeLoadIPAdapter", "CascadeLoadFaces") or (
        node["type"] == "CascadeLoadControlNet" and node["widgets_values"] == ["auto (identity)"]
    )


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
        *(f"controlnet/{kind}.safetensors" for kind in ("canny", "inpainting", "super_resolution")),
        "stable-cascade-prior/resolve/main/image_encoder/model.safetensors",
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
