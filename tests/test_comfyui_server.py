"""The pack in ComfyUI's own server, over HTTP and WebSocket."""

import asyncio
import io
import json
import struct
from pathlib import Path

import comfyui
import numpy as np
import pytest
from aiohttp import ClientSession, WSMsgType
from nodes_kit import ALL_NODES
from PIL import Image

from stable_cascade_nodes.host import cli

pytestmark = comfyui.needed

SNAPSHOT = Path(__file__).parent / "data" / "object_info.json"
GRAPH = comfyui.short(comfyui.graphs()["text_to_image"])
SAMPLER = next(number for number, node in GRAPH.items() if node["class_type"] == "CascadeSampleStageC")
LIMIT = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = comfyui.Server(comfyui.install(tmp_path_factory.mktemp("comfyui")))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


class Run:
    """A prompt sent with a WebSocket open; `on_message` may act on what arrives."""

    def __init__(self, server, graph, on_message=lambda event, data: None):
        self.previews, self.events = [], []
        asyncio.run(asyncio.wait_for(self._follow(server, graph, on_message), LIMIT))
        self.history = server.get(f"/history/{self.prompt_id}")[self.prompt_id]

    async def _follow(self, server, graph, on_message):
        address = f"http://127.0.0.1:{server.port}/ws?clientId=tests"
        async with ClientSession() as session, session.ws_connect(address) as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            body = {"prompt": graph, "client_id": "tests"}
            self.prompt_id = (await asyncio.to_thread(server.post, "/prompt", body))["prompt_id"]
            async for message in socket:
                if message.type == WSMsgType.BINARY:
                    self.previews.append(message.data)
                    continue
                content = json.loads(message.data)
                event, data = content["type"], content["data"]
                if data.get("prompt_id") != self.prompt_id:
                    continue
                self.events.append((event, data))
                await asyncio.to_thread(on_message, event, data)
                if event == "executing" and data["node"] is None:
                    return

    def of(self, event):
        return [data for name, data in self.events if name == event]


def pictures(server, run):
    found = []
    for output in run.history["outputs"].values():
        for image in output.get("images", []):
            query = f"filename={image['filename']}&type={image['type']}&subfolder={image['subfolder']}"
            found.append(Image.open(io.BytesIO(server.get(f"/view?{query}", raw=True))))
    return found


def test_nodes_are_what_the_snapshot_says(server):
    expected = json.loads(SNAPSHOT.read_text())
    info = {name: node for name, node in server.get("/object_info").items() if name in expected}
    assert list(info) == list(expected)
    assert not [line for line in server.log if "IMPORT FAILED" in line]
    for name, node in info.items():
        assert node["python_module"] == f"custom_nodes.{comfyui.PACK}"
        assert node["display_name"].startswith("Cascade: ") and node["description"] == ALL_NODES[name].DESCRIPTION
        for inputs in node["input"].values():
            for _, options in inputs.values():
                assert options.pop("tooltip")
        compared = set(expected[name]) - {"python_module"}
        assert {key: node[key] for key in compared} == {key: expected[name][key] for key in compared}, name


def test_templates_help_and_texts_are_served(server):
    templates = server.get("/api/workflow_templates")[comfyui.PACK]
    assert "text_to_image" in templates
    for name in templates:
        assert server.get(f"/api/workflow_templates/{comfyui.PACK}/{name}.json")["nodes"]
    texts = server.get("/i18n")["en"]["nodeDefs"]
    for name in ALL_NODES:
        page = server.get(f"/extensions/{comfyui.PACK}/docs/{name}.md", raw=True).decode()
        assert page.startswith(f"# {texts[name]['display_name']}\n")


def test_a_graph_runs_and_gives_the_embedded_hosts_picture(server, tmp_path):
    run = Run(server, GRAPH)
    assert run.history["status"]["status_str"] == "success"
    steps = [(data["value"], data["max"]) for data in run.of("progress") if data["node"] == SAMPLER]
    assert steps == [(step, 5) for step in range(1, 6)]
    # Stage C shows itself through the previewer, Stage B through Stage A.
    assert len(run.previews) == 5 + 3
    kind, length = struct.unpack(">II", run.previews[0][:8])
    assert kind == 4 and json.loads(run.previews[0][8 : 8 + length])["node_id"] == SAMPLER
    assert max(Image.open(io.BytesIO(run.previews[0][8 + length :])).size) == 512
    (picture,) = pictures(server, run)
    # ComfyUI adds what a loader said of its file.
    kept = {number: node | {"is_changed": None} for number, node in json.loads(picture.info["prompt"]).items()}
    assert kept == {number: node | {"is_changed": None} for number, node in GRAPH.items()}
    again = Run(server, GRAPH)
    assert set(again.of("execution_cached")[0]["nodes"]) == set(GRAPH) and not again.previews
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    assert cli.main(["run", str(tmp_path / "graph.json"), "--data", str(tmp_path)]) == 0
    (path,) = (tmp_path / "output").glob("*.png")
    ours, theirs = np.asarray(Image.open(path)).astype(int), np.asarray(picture).astype(int)
    assert ours.shape == theirs.shape and abs(ours - theirs).max() <= 1


def test_a_run_is_cancelled_half_way(server):
    long = GRAPH | {SAMPLER: GRAPH[SAMPLER] | {"inputs": GRAPH[SAMPLER]["inputs"] | {"steps": 1000, "seed": 7}}}

    def cancel(event, data):
        if event == "progress" and data["node"] == SAMPLER and data["value"] == 3:
            server.post("/interrupt", {})

    run = Run(server, long, cancel)
    assert run.of("execution_interrupted") and run.history["status"]["status_str"] == "error"
    assert max(data["value"] for data in run.of("progress") if data["node"] == SAMPLER) < 1000
    assert Run(server, GRAPH).history["status"]["status_str"] == "success"


def test_models_are_unloaded_and_memory_is_freed_on_request(server):
    assert set(Run(server, GRAPH).of("execution_cached")[0]["nodes"]) == set(GRAPH)
    server.post("/free", {"unload_models": True, "free_memory": True})
    # The request is served before the next job or after it: one of two finds nothing cached, not even the loaders.
    seeded = GRAPH | {SAMPLER: GRAPH[SAMPLER] | {"inputs": GRAPH[SAMPLER]["inputs"] | {"seed": 8}}}
    runs = [Run(server, seeded), Run(server, GRAPH)]
    assert all(run.history["status"]["status_str"] == "success" for run in runs)
    assert [] in [run.of("execution_cached")[0]["nodes"] for run in runs]


def test_a_wrong_file_is_said_to_the_client(server):
    wrong = GRAPH | {"2": GRAPH["2"] | {"inputs": {"file": "none.safetensors", "dtype": "auto"}}}
    body = json.dumps({"prompt": wrong}).encode()
    status, answer = asyncio.run(post(server, body))
    assert status == 400
    assert "none.safetensors" in json.dumps(answer["node_errors"]["2"])


async def post(server, body):
    async with ClientSession() as session, session.post(f"http://127.0.0.1:{server.port}/prompt", data=body) as answer:
        return answer.status, await answer.json()
