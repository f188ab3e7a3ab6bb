"""The executor against what ComfyUI 0.3.64 answered to the same prompts, in the same order."""

import json

import pytest
from comfyui_answers import PROMPT_ANSWERS, comparable, history_of, messages_of, probe_nodes

from stable_cascade_nodes.host import Host
from stable_cascade_nodes.host.folders import DataFolders


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """Every recorded prompt, submitted and run in the file's order on one fresh host."""
    messages = []
    host = Host(
        DataFolders(tmp_path_factory.mktemp("data")),
        lambda kind, data, client: messages.append((kind, json.loads(json.dumps(data)), client)),
    )
    host.registry.add(probe_nodes())
    given = {}
    for name, answer in PROMPT_ANSWERS.items():
        messages.clear()
        status, body = host.submit(answer["request"])
        ran = host.run_next()
        entry = json.loads(json.dumps(host.history(ran)[ran])) if ran else None
        given[name] = (status, json.loads(json.dumps(body)), list(messages), entry)
    return given


@pytest.mark.parametrize("name", PROMPT_ANSWERS)
def test_status_and_body(replay, name):
    status, body, _, _ = replay[name]
    assert status == PROMPT_ANSWERS[name]["status"]
    assert comparable(body, None, body.get("prompt_id")) == comparable(PROMPT_ANSWERS[name]["body"])


@pytest.mark.parametrize("name", PROMPT_ANSWERS)
def test_messages_in_order(replay, name):
    _, body, messages, _ = replay[name]
    got = [{"type": kind, "data": data} for kind, data, _ in messages]
    assert messages_of(got, body.get("prompt_id")) == messages_of(PROMPT_ANSWERS[name].get("ws", []))


@pytest.mark.parametrize("name", PROMPT_ANSWERS)
def test_history(replay, name):
    _, body, _, entry = replay[name]
    if "history" not in PROMPT_ANSWERS[name]:
        assert entry is None
    else:
        assert history_of(entry, body["prompt_id"]) == history_of(PROMPT_ANSWERS[name]["history"], "PID")


def test_queue_length_is_announced_around_a_run(replay):
    _, _, messages, _ = replay["ok_simple"]
    lengths = [data["status"]["exec_info"]["queue_remaining"] for kind, data, _ in messages if kind == "status"]
    assert lengths == [1, 1, 0]
    assert messages[-2][0] == "status"
    assert messages[-1][:2] == ("executing", {"node": None, "prompt_id": replay["ok_simple"][1]["prompt_id"]})


def test_refused_prompts_leave_the_queue_alone(replay):
    refused = [name for name, answer in PROMPT_ANSWERS.items() if answer["status"] == 400]
    assert len(refused) > 10
    assert all(replay[name][2] == [] for name in refused)
