"""The client without asyncio, and both on the embedded server."""

import asyncio
import json
import subprocess
import sys
import threading
import time

import pytest
from client_kit import (
    LIMIT,
    PROMPT,
    Serving,
    fake_comfy,
    follow,
)
from comfyui_answers import probe_nodes
from PIL import Image

from stable_cascade_nodes.host import ProgressBar, create_app
from stable_cascade_nodes.host.client import (
    Client,
    ClientError,
    ExecutionFailed,
    Finished,
    JobInterrupted,
    JobTimeout,
    NodeFinished,
    NodeOutput,
    NodeProgress,
    NodesCached,
    NodeStarted,
    Preview,
    PromptRefused,
    Result,
    ServerUnreachable,
    Started,
)


@pytest.fixture
def comfy():
    with fake_comfy() as fake:
        yield fake


def test_the_plain_client_does_the_same(comfy, tmp_path):
    comfy.files["output", "", "a.png"] = b"pixels"
    comfy.history["old"] = {"outputs": {}, "status": {"status_str": "success"}}
    comfy.info = {"D": {}}
    with Client(comfy.url) as client:
        job = client.submit(PROMPT, workflow={"nodes": []})
        events = list(job.events(LIMIT))
        assert [type(event) for event in events] == [Finished]
        assert job.done
        assert job.node_errors == {}
        (file,) = job.result(LIMIT).kept
        assert client.fetch(file) == b"pixels"
        assert client.download(file, tmp_path) == tmp_path / "a.png"
        assert client.job("old").result(LIMIT).files == []
        assert client.queue() == ([], [])
        assert set(client.history()) == {"old", job.prompt_id}
        assert client.object_info("D") == {"D": {}}
        assert client.upload_image(b"x", "x.png").value == "x.png"
        client.interrupt()
        client.cancel("other")
        comfy.answer = (400, {"error": {"message": "no"}, "node_errors": {}})
        with pytest.raises(PromptRefused):
            client.submit(PROMPT)
    assert comfy.interrupts == [{}, {"prompt_id": "other"}]
    assert comfy.bodies[0]["client_id"] == client.client_id
    with pytest.raises(ClientError, match="not connected"):
        client.queue()


def test_the_plain_client_waits_with_a_limit_and_cancels(comfy):
    async def script(run):
        pass

    comfy.script = script
    with Client(comfy.url) as client:
        job = client.submit(PROMPT)
        with pytest.raises(JobTimeout):
            job.result(0.01)
        with pytest.raises(JobTimeout):
            list(job.events(0.01))
        job.cancel()
        with pytest.raises(JobInterrupted):
            job.result(LIMIT)
    before = {thread.name for thread in threading.enumerate()}
    assert "cascade-client" not in before
    comfy.serving.stop()
    with pytest.raises(ServerUnreachable), Client(comfy.url, timeout=5):
        pass
    assert "cascade-client" not in {thread.name for thread in threading.enumerate()}
    comfy.serving.start_again()


def test_ctrl_c_leaves_nothing_waiting_behind(comfy, monkeypatch):
    async def script(run):
        run.begin()

    futures, schedule = [], asyncio.run_coroutine_threadsafe

    def interrupted(work, loop):
        def result():
            raise KeyboardInterrupt

        futures.append(schedule(work, loop))
        futures[-1].result = result
        return futures[-1]

    comfy.script = script
    with Client(comfy.url) as client:
        job = client.submit(PROMPT)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
            job.result(LIMIT)
        assert [future.cancelled() for future in futures] == [True]
        assert client.queue() == ([job.prompt_id], [])


def test_importing_the_client_needs_no_aiohttp():
    code = (
        "import sys\n"
        "sys.modules['aiohttp'] = None\n"
        "from stable_cascade_nodes.host import client\n"
        "assert client.PromptRefused and client.Preview\n"
        "assert sorted(client.__all__) == client.__all__\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The embedded server.


class Endless:
    """Runs until it is interrupted; shows a preview at each step."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"limit": ("INT", {"default": 0})}}

    def go(self, limit):
        bar = ProgressBar(10)
        step = 0
        while limit == 0 or step < limit:
            step += 1
            time.sleep(0.01)  # more previews than that keep a server from anything else
            bar.update_absolute(1, preview=Image.new("RGB", (4, 4), "red"))
        return (step,)


@pytest.fixture
def embedded(tmp_path):
    nodes = {**probe_nodes(), "Endless": Endless}
    with Serving(lambda: create_app(nodes, tmp_path)) as serving:
        yield serving


def source(**inputs):
    return {"class_type": "P_Src", "inputs": {"i": 1, "f": 1.0, "s": "x", "b": True, "c": "a", **inputs}}


def shown(node, slot=0):
    return {"class_type": "P_ShowInt", "inputs": {"v": [node, slot]}}


def test_the_embedded_server_runs_a_prompt(embedded):
    prompt = {"1": {"class_type": "P_Slow", "inputs": {"n": 3, "seed": 1}}, "2": shown("1")}

    async def work(client):
        job = await client.submit(prompt)
        events = [event async for event in job.events(LIMIT)]
        again = await client.submit(prompt)
        return events, [event async for event in again.events(LIMIT)], job

    events, cached, job = follow(embedded.url, work)
    id = job.prompt_id
    assert events == [
        Started(id),
        NodeStarted(id, "1"),
        *(NodeProgress(id, "1", value, 3) for value in (1, 2, 3)),
        NodeFinished(id, "1"),
        NodeStarted(id, "2"),
        NodeOutput(id, "2", {"text": ["3"]}),
        NodeFinished(id, "2"),
        Finished(id, Result(id, {"2": {"text": ["3"]}})),
    ]
    assert cached[1].nodes == ("1", "2")
    assert [type(event) for event in cached] == [Started, NodesCached, NodeOutput, Finished]


def test_the_embedded_server_fails_and_refuses(embedded):
    async def work(client):
        job = await client.submit({"2": {"class_type": "P_Fail", "inputs": {"msg": "kaboom"}}, "3": shown("2")})
        with pytest.raises(ExecutionFailed, match=r"node #2 \(P_Fail\) failed: kaboom"):
            await job.result(LIMIT)
        with pytest.raises(PromptRefused, match=r"node #1 \(P_Src\): Value 99 bigger than max of 10"):
            await client.submit({"1": source(i=99), "2": shown("1")})
        job = await client.submit({"1": source(i=99), "2": shown("1"), "3": source(), "4": shown("3")})
        assert list(job.node_errors) == ["1"]
        return await job.result(LIMIT)

    assert follow(embedded.url, work).outputs == {"4": {"text": ["1"]}}


def test_the_embedded_server_shows_previews_and_is_interrupted(embedded):
    async def work(client):
        job = await client.submit({"1": {"class_type": "Endless", "inputs": {"limit": 0}}, "2": shown("1")})
        waiting = await client.submit({"1": source(), "2": shown("1")}, front=False)
        preview = None
        async for event in job.events(LIMIT):
            if isinstance(event, Preview) and preview is None:
                preview = event
                await waiting.cancel()
                await job.cancel()
        for ended in (job, waiting):
            with pytest.raises(JobInterrupted):
                await ended.result(LIMIT)
        return preview, await (await client.submit({"1": source(), "2": shown("1")})).result(LIMIT)

    preview, result = follow(embedded.url, work)
    assert (preview.node, preview.mime) == ("1", "image/jpeg")
    assert preview.image.startswith(b"\xff\xd8")
    assert result.outputs == {"2": {"text": ["1"]}}


def test_the_embedded_server_takes_and_gives_pictures(embedded, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")

    async def work(client):
        sent = await client.upload_image(tmp_path / "red.png", subfolder="in")
        prompt = {
            "1": {"class_type": "LoadImage", "inputs": {"image": sent.value}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "cats/x"}},
        }
        job = await client.submit(prompt, workflow={"nodes": [], "links": []})
        (file,) = (await job.result(LIMIT)).kept
        return file, await client.download(file, tmp_path / "here")

    file, path = follow(embedded.url, work)
    assert (file.subfolder, file.type, file.node) == ("cats", "output", "2")
    with Image.open(path) as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)
        assert json.loads(picture.info["workflow"]) == {"nodes": [], "links": []}
