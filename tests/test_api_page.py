"""The page about HTTP: its programs are run as they stand there, against this package's server."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from client_kit import Serving
from PIL import Image

import stable_cascade_nodes
from stable_cascade_nodes.host import client
from stable_cascade_nodes.host.server.app import cascade_app

ROOT = Path(stable_cascade_nodes.__file__).parent
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8188"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Serving(lambda: cascade_app(tmp_path_factory.mktemp("data"))) as serving:
        yield serving


@pytest.fixture
def folder(tmp_path):
    """Where a reader tries the programs: with the graph, of which fewer steps do here."""
    graph = json.loads((ROOT / "workflows/api/text_to_image.json").read_text())
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    (tmp_path / "text_to_image.json").write_text(json.dumps(graph))
    return tmp_path


def run(served, folder, *command):
    command = [part.replace(ADDRESS, served.url) for part in command]
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def size(path):
    with Image.open(path) as picture:
        return picture.size


def test_the_command(served, folder):
    (line,) = COMMANDS[0].splitlines()
    assert line.startswith("cascade submit ")
    (path,) = run(served, folder, "-m", "stable_cascade_nodes.host.cli", *line.split()[1:])
    assert path.startswith("pictures/")
    with Image.open(folder / path) as picture:
        assert json.loads(picture.info["prompt"])["9"]["inputs"]["seed"] == 7


def test_the_class(served, folder):
    *lines, path = run(served, folder, "-c", PROGRAMS[0])
    assert "node 9: 2 of 2" in lines
    assert size(folder / path) == (256, 256)


def test_the_class_for_asyncio(served, folder):
    lines = run(served, folder, "-c", PROGRAMS[1])
    assert [re.fullmatch(r"\d{3,} bytes", line) is not None for line in lines] == [True, True]


def test_python_without_any_package(served, folder):
    assert "import aiohttp" not in PROGRAMS[2]
    assert run(served, folder, "-c", PROGRAMS[2]) == ["success"]
    (picture,) = folder.glob("*.png")
    assert size(picture) == (256, 256)
    with Image.open(picture) as opened:
        assert json.loads(opened.info["prompt"])["6"]["inputs"]["text"].startswith("a large green star")


def test_python_with_the_websocket(served, folder):
    lines = run(served, folder, "-c", PROGRAMS[3])
    assert "node 9 2 of 2" in lines
    assert any(line.startswith("a preview of ") for line in lines)
    assert "'filename': " in lines[-1]
    assert len(PROGRAMS) == 4


def test_the_calls_are_routes_of_the_server(served):
    routes = {(route.method, generic(route.resource.canonical)) for route in served.app.router.routes()}
    called = re.findall(r"\$SERVER(/[a-zA-Z_/]*)(.*)", COMMANDS[1])
    assert len(called) == 7
    for path, options in called:
        method = "POST" if re.search(r" (-d @|-F|-X POST)", options) else "GET"
        assert (method, generic(path)) in routes
    listed = re.findall(r"`(GET|POST) (/[a-zA-Z_/]+)", PAGE.split("### curl")[1])
    assert len(listed) >= 8
    for method, path in listed:
        assert (method, generic(path)) in routes


def generic(path):
    """A path with `*` for what stands for an id or a class."""
    return re.sub(r"\{[^}]*\}|(?<=/)[A-Z]\w*", "*", path)


def test_what_the_page_names_exists():
    for name in re.findall(r"`([A-Z][a-zA-Z]+)`", PAGE):
        assert hasattr(client, name) or name in ("LoadImage", "Origin"), name
    methods = re.findall(r"^\| ((?:`[a-z_]+\(.*?\)`(?:, )?)+) \|", PAGE, re.MULTILINE)
    names = {name for cell in methods for name in re.findall(r"`([a-z_]+)\(", cell)}
    attributes = {"prompt_id", "done", "node_errors"}
    public = [
        {name for kind in kinds for name in vars(kind) if not name.startswith("_")} - attributes - {"connect", "close"}
        for kinds in ((client.Client, client.Job), (client.AsyncClient, client.AsyncJob))
    ]
    assert public == [names, names]


def test_links_lead_to_headings():
    headings = {
        re.sub(r"[^a-z -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)", PAGE, re.MULTILINE)
    }
    links = re.findall(r"\]\(#([^)]*)\)", PAGE.replace("\n", " "))
    assert len(links) == 3
    assert set(links) <= headings
