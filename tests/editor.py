"""The real editor in headless Chromium on a server of its own, driven as a person does."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Milliseconds, for a busy machine.
LIMIT = 60_000

# What the editor asks for without knowing whether it is there: 404 means no.
_MAY_BE_MISSING = re.compile(
    r"/user\.css|/api/(userdata(|/user\.css|/comfy\.templates\.json|/workflows%2F\.index\.json)|global_subgraphs)"
    r"|/api/experiment/models|/extensions/[^/]+/docs/[^/]+/en\.md"
)

# What happens on the nodes, frame by frame, and how runs end.
_WATCH = """() => {
  window.watched = { progress: {}, pictures: {}, ended: [] };
  const add = (list, value) => { if (list.at(-1) !== value) list.push(value); };
  const frame = () => {
    for (const node of app.graph.nodes) {
      if (node.progress) add((watched.progress[node.id] ??= []), node.progress);
      for (const image of node.imgs ?? []) add((watched.pictures[node.id] ??= []), image.src);
    }
    requestAnimationFrame(frame);
  };
  frame();
  for (const end of ["success", "error", "interrupted"]) {
    app.api.addEventListener(`execution_${end}`, (event) => watched.ended.push([end, event.detail]));
  }
}"""


_OVERLAPS = """() => {
  const boxes = app.graph.nodes.map((node) => ({
    id: node.id, left: node.pos[0], top: node.pos[1] - 30, right: node.pos[0] + node.size[0],
    bottom: node.pos[1] + node.size[1],
  }));
  const touch = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => touch(a, b)).map((b) => [a.id, b.id]));
}"""

# The view shows all nodes and has come to rest: after loading, it glides there.
_SETTLED = """() => {
  const { ds, canvas } = app.canvas;
  const box = canvas.getBoundingClientRect();
  const inside = app.graph.nodes.every((node) => {
    const [left, top] = [0, 1].map((axis) => (node.pos[axis] + ds.offset[axis]) * ds.scale);
    return left > 0 && top > 0 && left + node.size[0] * ds.scale < box.width && top < box.height;
  });
  const view = [ds.scale, ...ds.offset].join();
  const rests = view === window.lastView;
  window.lastView = view;
  return inside && rests;
}"""


class Server:
    """`cascade serve` in a process of its own, with its files in `data`."""

    def __init__(self, data):
        self.data = data
        self._log = (data / "server.log").open("w+")
        command = [sys.executable, "-m", "stable_cascade_nodes.host.cli", "serve", "--port", "0", "--no-browser"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("CASCADE_MODELS", None)
        self._process = subprocess.Popen(
            [*command, "--data", str(data)], stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        line = self._process.stdout.readline()
        parts = urlsplit(next((word for word in line.split() if word.startswith("http")), ""))
        if not parts.netloc:
            raise RuntimeError(f"The server did not start: {line}{self.log()}")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.pack = parse_qs(parts.query)["source"][0]

    def log(self):
        self._log.flush()
        return Path(self._log.name).read_text()

    def stop(self):
        self._process.terminate()
        self._process.wait(30)
        self._process.stdout.close()
        self._log.close()


class Editor:
    """One page of the editor, with an empty profile.

    `faults` collects what must not happen: errors of scripts, failed requests, and requests to other machines.
    """

    def __init__(self, page, server, screenshots):
        self.page = page
        self.server = server
        self.faults = []
        self._screenshots = screenshots
        page.set_default_timeout(LIMIT)
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.on("console", self._console)
        page.on("request", self._request)
        page.on("response", self._response)
        # From the start: a chooser that opens just when a test begins to listen would be lost.
        page.on("filechooser", lambda chooser: None)

    def _console(self, message):
        # Failed requests are judged by their address.
        quiet = "Failed to load resource" in message.text or ("user.css" in message.text and "MIME" in message.text)
        if message.type == "error" and not quiet:
            self.faults.append(f"console: {message.text}")

    def _request(self, request):
        if not request.url.startswith((self.server.url, "data:", "blob:")):
            self.faults.append(f"outside: {request.url}")

    def _response(self, response):
        missing = response.status == 404 and _MAY_BE_MISSING.fullmatch(urlsplit(response.url).path)
        if response.status >= 400 and not missing:
            self.faults.append(f"{response.status}: {response.url}")

    def expect(self, pattern):
        """Forgive faults that begin with a pattern; there must be one."""
        found = [fault for fault in self.faults if re.match(pattern, fault)]
        assert found, f"expected {pattern}, found {self.faults}"
        self.faults = [fault for fault in self.faults if fault not in found]

    def open(self, template="text_to_image"):
        """Open a template by its address, as `cascade serve` does."""
        self.page.goto(f"{self.server.url}/?template={template}&source={self.server.pack}")
        # What was open before comes first for a moment.
        nodes = read_json(ROOT / "workflows" / f"{template}.json")["nodes"]
        self.wait(
            "(nodes) => nodes === window.app?.graph?.nodes?.map(({ id, type }) => `${id} ${type}`).sort().join()",
            ",".join(sorted(f"{node['id']} {node['type']}" for node in nodes)),
        )
        self.page.get_by_test_id("queue-button").wait_for()
        self.page.wait_for_function(_SETTLED, polling=100, timeout=LIMIT)
        self.page.evaluate(_WATCH)

    def wait(self, condition, argument=None):
        """Wait until a JavaScript expression is true."""
        return self.page.wait_for_function(condition, arg=argument, timeout=LIMIT)

    def ask(self, expression, argument=None):
        return self.page.evaluate(expression, argument)

    def shot(self, name):
        """Keep a screenshot."""
        self.page.screenshot(path=self._screenshots / f"{name}.png")

    def serialized(self):
        """The graph as the editor would save it."""
        return self.ask("app.graph.serialize()")

    def exported(self):
        """The graph in API format, by the editor's own export."""
        return self.ask("app.graphToPrompt().then((prompt) => prompt.output)")

    def node(self, node_id, expression):
        """What a JavaScript expression of `node` gives."""
        return self.ask(
            f"(id) => ((node) => {expression})(app.graph.nodes.find((node) => String(node.id) === id))", str(node_id)
        )

    def point(self, node_id, x, y):
        """Where a place on a node is on the page; x and y count from the corner below its title."""
        return self.ask(
            """([id, x, y]) => {
              const node = app.graph.nodes.find((node) => String(node.id) === id);
              const { ds, canvas } = app.canvas;
              const box = canvas.getBoundingClientRect();
              return [
                (node.pos[0] + x + ds.offset[0]) * ds.scale + box.left,
                (node.pos[1] + y + ds.offset[1]) * ds.scale + box.top,
              ];
            }""",
            [str(node_id), x, y],
        )

    def select(self, node_id):
        """Click on a node's title."""
        self.page.mouse.click(*self.point(node_id, self.node(node_id, "node.size[0] / 2"), -15))
        self.wait("(id) => Object.keys(app.canvas.selected_nodes ?? {}).includes(id)", str(node_id))

    def type_number(self, node_id, widget, value):
        """Double-click on a number of a node and type another."""
        y = self.node(node_id, f"node.widgets.find((widget) => widget.name === '{widget}').last_y")
        self.page.mouse.dblclick(*self.point(node_id, self.node(node_id, "node.size[0] / 2"), y + 10))
        box = self.page.locator(".graphdialog input")
        box.fill(str(value))
        box.press("Enter")
        box.wait_for(state="hidden")
        assert self.value(node_id, widget) == value

    def type_text(self, node_id, text):
        """Write into the text box of a node."""
        box = self.node(node_id, "node.widgets.find((widget) => widget.element).element.value")
        (found,) = [area for area in self.page.locator("textarea:visible").all() if area.input_value() == box]
        found.fill(text)
        assert self.value(node_id, "text") == text

    def value(self, node_id, widget):
        return self.node(node_id, f"node.widgets.find((widget) => widget.name === '{widget}')?.value")

    def start(self):
        """Press Run; returns how many runs had ended before."""
        before = self.ask("watched.ended.length")
        self.page.get_by_test_id("queue-button").click()
        return before

    def end(self, before):
        """Wait for the end of the run; returns "success", "error" or "interrupted" and what the message said."""
        self.wait("(before) => watched.ended.length > before", before)
        return self.ask("watched.ended.at(-1)")

    def run(self):
        """Press Run and wait for the end."""
        kind, data = self.end(self.start())
        assert kind == "success", data.get("exception_message")

    def pictures(self, node_id):
        """The pictures that a node shows, once they are loaded, as the server has them."""
        self.wait(
            """(id) => {
              const images = app.graph.nodes.find((node) => String(node.id) === id).imgs ?? [];
              return images.length > 0 && images.every((image) => image.naturalWidth > 0);
            }""",
            str(node_id),
        )
        addresses = self.node(node_id, "node.imgs.map((image) => image.src)")
        return [Image.open(io.BytesIO(self.page.request.get(address).body())) for address in addresses]

    def picture(self, node_id):
        """The only picture that a node shows."""
        (found,) = self.pictures(node_id)
        return found

    def overlaps(self):
        """Pairs of nodes that cover each other."""
        return self.ask(_OVERLAPS)


def pixels(picture):
    return np.asarray(picture.convert("RGB"))


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def editor_server(tmp_path_factory):
    pytest.importorskip("comfyui_frontend_package", reason="comfyui-frontend-package is not installed")
    server = Server(tmp_path_factory.mktemp("data"))
    yield server
    server.stop()


# Not for the session: while Playwright runs, its thread counts as inside an event loop, and asyncio refuses another.
@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the package chromium, or name the program in the variable CHROMIUM")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory):
    """Where screenshots go: the folder in the variable CASCADE_SCREENSHOTS, else among pytest's temporary files."""
    chosen = os.environ.get("CASCADE_SCREENSHOTS")
    folder = Path(chosen).absolute() if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def editor(chromium, editor_server, screenshots):
    """The editor, not opened yet. At the end of the test nothing may have gone wrong unseen."""
    # What an earlier test left open or shut.
    (editor_server.data / "user/default/comfy.settings.json").unlink(missing_ok=True)
    context = chromium.new_context(viewport={"width": 1600, "height": 1000})
    opened = Editor(context.new_page(), editor_server, screenshots)
    yield opened
    context.close()
    assert not opened.faults, "\n".join(opened.faults)
