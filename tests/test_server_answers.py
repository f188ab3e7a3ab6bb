"""The server against everything that ComfyUI 0.3.64 answered, in the record's order, over real HTTP and WebSocket."""

import json

import pytest
from aiohttp import FormData
from comfyui_answers import PROMPT_ANSWERS, ROUTE_ANSWERS, comparable, history_of, messages_of, probe_nodes
from server_kit import Listener, run, serving

PREFIXES = ("", "/api")
BODIES = {"route_userdata_put": b"hi", "route_free": b"{}", "route_origin": b"{}"}
FILES = {"route_upload_1": ("q.png", {"subfolder": "sub"}), "route_upload_escape": ("../../q.png", {})}


def form(file_name, fields):
    data = FormData()
    data.add_field("image", b"\x89PNG", filename=file_name, content_type="image/png")
    for name, value in fields.items():
        data.add_field(name, value)
    return data


async def replay(data_dir, prefix):
    """Prompts and routes as recorded: name -> what came back."""
    given = {}
    async with serving(probe_nodes(), data_dir) as client:
        listener = await Listener.open(client, "CID", path=prefix + "/ws")
        listener.take()
        for name, recorded in PROMPT_ANSWERS.items():
            async with client.post(prefix + "/prompt", json=recorded["request"]) as response:
                body = await response.json()
            entry = None
            if response.status == 200:
                await listener.end_of(body["prompt_id"])
                async with client.get(f"{prefix}/history/{body['prompt_id']}") as history:
                    entry = (await history.json()).get(body["prompt_id"])
            await listener.sync()
            messages = [message for message in listener.take() if message["type"] != "feature_flags"]
            given[name] = (response.status, body, messages, entry)
        for name, recorded in ROUTE_ANSWERS.items():
            method, path = recorded.get("request", "POST /upload/image").split(" ", 1)
            headers = {"Origin": "http://example.com"} if name == "route_origin" else None
            data = form(*FILES[name]) if name in FILES else BODIES.get(name)
            async with client.request(method, prefix + path, data=data, headers=headers) as response:
                given[name] = (response.status, response.content_type, await response.text())
    return given


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return {prefix: run(replay(tmp_path_factory.mktemp("data"), prefix)) for prefix in PREFIXES}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", PROMPT_ANSWERS)
def test_status_and_body_of_a_prompt(answers, prefix, name):
    status, body, _, _ = answers[prefix][name]
    assert status == PROMPT_ANSWERS[name]["status"]
    assert comparable(body, None, body.get("prompt_id")) == comparable(PROMPT_ANSWERS[name]["body"])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", PROMPT_ANSWERS)
def test_messages_of_a_prompt(answers, prefix, name):
    _, body, messages, _ = answers[prefix][name]
    recorded = PROMPT_ANSWERS[name].get("ws", [])
    assert messages_of(messages, body.get("prompt_id")) == messages_of(recorded)
    # Who listens also hears of the queue, at the same places.
    kinds = [m["type"] for m in recorded if "sid" not in m["data"] and m["type"] != "feature_flags"]
    assert [message["type"] for message in messages] == kinds


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", PROMPT_ANSWERS)
def test_history_of_a_prompt(answers, prefix, name):
    _, body, _, entry = answers[prefix][name]
    if "history" not in PROMPT_ANSWERS[name]:
        assert entry is None
    else:
        assert history_of(entry, body["prompt_id"]) == history_of(PROMPT_ANSWERS[name]["history"], "PID")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ROUTE_ANSWERS)
def test_routes(answers, prefix, name):
    status, content_type, text = answers[prefix][name]
    recorded = ROUTE_ANSWERS[name]
    assert status == recorded["status"]
    # Where the record has none, the answer is JSON.
    assert content_type == recorded.get("ctype", "application/json")
    if content_type == "application/json":
        assert comparable(json.loads(text)) == comparable(json.loads(recorded["body"]))
    else:
        assert text == recorded["body"]
