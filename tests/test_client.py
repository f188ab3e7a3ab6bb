"""The client: what happens to a job, against a ComfyUI that follows a script."""

import json

import pytest
from client_kit import (
    LIMIT,
    PROMPT,
    ending,
    fake_comfy,
    follow,
    frame_1,
    frame_4,
    replay,
    run_one,
    saved,
)
from comfyui_answers import PROMPT_ANSWERS
from hypothesis import given
from hypothesis import strategies as st

from stable_cascade_nodes.host.client import (
    ExecutionFailed,
    Failed,
    Finished,
    Interrupted,
    JobInterrupted,
    NodeBlocked,
    NodeFinished,
    NodeOutput,
    NodeProgress,
    NodesCached,
    NodeStarted,
    Preview,
    Result,
    Started,
)
from stable_cascade_nodes.host.client.frames import JobMessages, outcome_in_history, read_message, read_preview


@pytest.fixture
def comfy():
    with fake_comfy() as fake:
        yield fake


def test_recorded_messages_of_comfyui_become_events(comfy):
    recorded = PROMPT_ANSWERS["slow"]
    events, job = run_one(comfy, replay(recorded["ws"], recorded["history"]["outputs"]))
    id = job.prompt_id
    assert events == [
        Started(id),
        NodeStarted(id, "1"),
        NodeProgress(id, "1", 1, 3),
        NodeProgress(id, "1", 2, 3),
        NodeProgress(id, "1", 3, 3),
        NodeFinished(id, "1"),
        NodeStarted(id, "2"),
        NodeOutput(id, "2", {"text": ["3"]}),
        NodeFinished(id, "2"),
        Finished(id, Result(id, {"2": {"text": ["3"]}})),
    ]


def test_a_run_of_which_all_is_cached(comfy):
    recorded = PROMPT_ANSWERS["changed_2"]
    events, job = run_one(comfy, replay(recorded["ws"], recorded["history"]["outputs"]))
    id = job.prompt_id
    assert events == [
        Started(id),
        NodesCached(id, ("1", "2")),
        NodeOutput(id, "2", {"text": ["1"]}),
        Finished(id, Result(id, {"2": {"text": ["1"]}})),
    ]


def test_previews_of_both_kinds(comfy):
    async def script(run):
        run.begin()
        await run.send("executing", node="5")
        await run.frame(frame_1(b"png", 2))
        await run.frame(frame_4(run.id, "7", b"jpeg"))
        await run.frame(frame_4("another job", "7", b"other"))
        await run.end()

    events, job = run_one(comfy, script)
    assert events[1:3] == [
        Preview(job.prompt_id, "5", b"png", "image/png"),
        Preview(job.prompt_id, "7", b"jpeg", "image/jpeg"),
    ]
    assert [type(event) for event in events[3:]] == [Finished]
    assert comfy.features == [{"type": "feature_flags", "data": {"supports_preview_metadata": True}}]


def test_who_reads_late_gets_the_newest_preview_of_a_node(comfy):
    async def script(run):
        run.begin()
        for image in (b"1", b"2", b"3"):
            await run.frame(frame_4(run.id, "7", image))
        await run.frame(frame_4(run.id, "8", b"4"))
        await run.end()

    comfy.script = script

    async def work(client):
        job = await client.submit(PROMPT)
        await job.result(LIMIT)
        return [event.image async for event in job.events() if isinstance(event, Preview)]

    assert follow(comfy.url, work) == [b"3", b"4"]


def test_what_is_no_message_is_passed_over(comfy):
    async def script(run):
        run.begin()
        socket = run.server.sockets[run.client]
        for text in ("", "{", "[]", '{"type": "progress"}', '{"type": 3, "data": {}}', '{"type": "x", "data": []}'):
            await socket.send_str(text)
        for frame in (b"", b"\0\0\0\1", frame_1(b"x", 9), frame_4(run.id, 7, b"x"), b"\0\0\0\4\xff\xff\xff\xff{}"):
            await run.frame(frame)
        await run.send("progress", node="1", value="half", max=None)
        await run.send("progress_state", nodes={"1": None})
        await run.send("executed", node="1", output=[1])
        await run.send("__init__")
        await run.send("some_day", node="1")
        await run.end()

    events, _ = run_one(comfy, script)
    assert [type(event) for event in events] == [Finished]


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_no_message_of_any_shape_raises(data):
    for kind in (
        "executing",
        "progress",
        "progress_state",
        "executed",
        "execution_error",
        "execution_cached",
        "status",
    ):
        text = json.dumps({"type": kind, "data": {"prompt_id": "1", "node": data, "nodes": data, "output": data}})
        JobMessages("1").receive(*read_message(text))
        JobMessages("1").receive(*read_message(json.dumps({"type": kind, "data": {"node_id": data}})))
    assert isinstance(outcome_in_history("1", {"outputs": data, "status": data}), Failed)
    ended = outcome_in_history(
        "1", {"outputs": {"1": data, "2": {"images": data}}, "status": {"status_str": "success"}}
    )
    assert ended.result.files == []


@given(st.binary(max_size=40))
def test_no_binary_frame_raises(content):
    found = read_preview(content)
    assert found is None or content.endswith(found.image)
    for event in (b"\0\0\0\1", b"\0\0\0\4", b"\0\0\0\4\0\0\0\5"):
        read_preview(event + content)


def test_a_failing_node(comfy):
    recorded = PROMPT_ANSWERS["fail"]

    async def script(run):
        history = recorded["history"]
        await replay(recorded["ws"][:-1], {})(run)
        run.leave(history["outputs"], messages=history["status"]["messages"], status="error")
        await run.send("executing", node=None)

    events, job = run_one(comfy, script)
    assert events[-1] == Failed(job.prompt_id, "2", "P_Fail", "kaboom\n", "ValueError", ("<traceback>",))
    error = ending(comfy, script)
    assert isinstance(error, ExecutionFailed)
    assert str(error) == "node #2 (P_Fail) failed: kaboom"
    assert (error.node, error.node_type, error.exception_type) == ("2", "P_Fail", "ValueError")


def test_a_blocked_node_is_no_end(comfy):
    async def script(run):
        run.begin()
        await run.send(
            "execution_error", node_id="4", exception_type="ExecutionBlocked", exception_message="Execution Blocked: no"
        )
        await run.end({"9": {"images": [saved("a.png")]}})

    events, job = run_one(comfy, script)
    assert events[0] == NodeBlocked(job.prompt_id, "4", "Execution Blocked: no")
    assert isinstance(events[-1], Finished)


def test_an_interrupted_job(comfy):
    async def script(run):
        run.begin()
        await run.fail("execution_interrupted", node_id="6")

    events, job = run_one(comfy, script)
    assert events == [Interrupted(job.prompt_id, "6")]
    error = ending(comfy, script)
    assert isinstance(error, JobInterrupted)
    assert str(error) == "interrupted in node #6"


def test_a_history_that_is_gone_at_the_end(comfy):
    async def script(run):
        run.begin()
        await run.send("executed", node="9", output={"images": [saved("a.png")]})
        await run.send("execution_success")
        run.leave()
        run.server.history.clear()
        await run.send("executing", node=None)

    events, job = run_one(comfy, script)
    assert events[-1] == Finished(job.prompt_id, Result(job.prompt_id, {"9": {"images": [saved("a.png")]}}))
