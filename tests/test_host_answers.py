"""The executor against what ComfyUI 0.3.64 answered to the same prompts, in the same order.

Compared: status, body, messages with their order, history. Left out: `number`, client and prompt ids (replaced in the
record), time stamps, tracebacks, `status` messages, and the order of what ComfyUI keeps in sets.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stable_cascade_nodes.host import ExecutionBlocker, Host, ProgressBar
from stable_cascade_nodes.host.folders import DataFolders

DATA = Path(__file__).parent / "data"
ANSWERS = {
    name: answer
    for name, answer in json.loads((DATA / "comfyui" / "answers_0.3.64.json").read_text()).items()
    if not name.startswith("route_")
}
UNORDERED = {"errors", "dependent_outputs", "nodes", "current_outputs"}


def probe_nodes():
    spec = importlib.util.spec_from_file_location("probe_nodes", DATA / "probe_nodes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.time = SimpleNamespace(sleep=lambda seconds: None)
    return module.make_probe_nodes(ProgressBar, ExecutionBlocker)


def comparable(value, key=None, prompt_id=None):
    """`value` as JSON, with ids, times and set orders made equal."""
    if isinstance(value, dict):
        left_out = {"number", "create_time"}
        return {k: comparable(v, k, prompt_id) for k, v in value.items() if k not in left_out}
    if key == "traceback":
        return "traceback"
    if key == "timestamp":
        return 0
    if isinstance(value, (list, tuple)):
        items = [comparable(item, None, prompt_id) for item in value]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True)) if key in UNORDERED else items
    return "PID" if prompt_id is not None and value == prompt_id else value


def history_of(entry, prompt_id):
    entry = comparable(entry, None, prompt_id)
    _, name, prompt, extra_data, outputs = entry["prompt"]
    entry["prompt"] = [name, prompt, extra_data, sorted(outputs)]
    return entry


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
    for name, answer in ANSWERS.items():
        messages.clear()
        status, body = host.submit(answer["request"])
        ran = host.run_next()
        entry = json.loads(json.dumps(host.history(ran)[ran])) if ran else None
        given[name] = (status, json.loads(json.dumps(body)), list(messages), entry)
    return given


@pytest.mark.parametrize("name", ANSWERS)
def test_status_and_body(replay, name):
    status, body, _, _ = replay[name]
    assert status == ANSWERS[name]["status"]
    assert comparable(body, None, body.get("prompt_id")) == comparable(ANSWERS[name]["body"])


@pytest.mark.parametrize("name", ANSWERS)
def test_messages_in_order(replay, name):
    _, body, messages, _ = replay[name]
    got = [
        {"type": kind, "data": comparable(data, None, body.get("prompt_id"))}
        for kind, data, _ in messages
        if kind != "status"
    ]
    want = [comparable(message) for message in ANSWERS[name].get("ws", []) if message["type"] != "status"]
    assert got == want


@pytest.mark.parametrize("name", ANSWERS)
def test_history(replay, name):
    _, body, _, entry = replay[name]
    if "history" not in ANSWERS[name]:
        assert entry is None
    else:
        assert history_of(entry, body["prompt_id"]) == history_of(ANSWERS[name]["history"], "PID")


def test_queue_length_is_announced_around_a_run(replay):
    _, _, messages, _ = replay["ok_simple"]
    lengths = [data["status"]["exec_info"]["queue_remaining"] for kind, data, _ in messages if kind == "status"]
    assert lengths == [1, 1, 0]
    assert messages[-2][0] == "status"
    assert messages[-1][:2] == ("executing", {"node": None, "prompt_id": replay["ok_simple"][1]["prompt_id"]})


def test_refused_prompts_leave_the_queue_alone(replay):
    refused = [name for name, answer in ANSWERS.items() if answer["status"] == 400]
    assert len(refused) > 10
    assert all(replay[name][2] == [] for name in refused)
