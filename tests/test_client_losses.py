"""The client: jobs whose end nobody tells, lost connections, limits of patience."""

import asyncio
import threading

import pytest
from client_kit import (
    LIMIT,
    PROMPT,
    complete,
    ending,
    fake_comfy,
    follow,
    run_one,
    saved,
)
from comfyui_answers import PROMPT_ANSWERS

from stable_cascade_nodes.host.client import (
    AsyncClient,
    ClientError,
    Finished,
    JobLost,
    JobTimeout,
    NodeProgress,
    NodeStarted,
    ServerFile,
    ServerUnreachable,
    Started,
)


@pytest.fixture
def comfy():
    with fake_comfy() as fake:
        yield fake


def test_a_job_that_ended_before_anyone_listened(comfy):
    recorded = PROMPT_ANSWERS["ok_simple"]["history"]
    comfy.history["old"] = {**recorded, "outputs": {"9": {"images": [saved("a.png", "cats")]}}}

    async def work(client):
        return await client.job("old").result(LIMIT)

    assert follow(comfy.url, work, poll_interval=10 * LIMIT).images == [ServerFile("a.png", "cats", "output", "9")]


def test_a_lost_socket_is_opened_again_and_the_end_found_in_the_history(comfy):
    async def script(run):
        run.begin()
        await run.send("executing", node="1")
        run.leave({"9": {"images": [saved("a.png")]}})
        await run.cut()

    events, _ = run_one(comfy, script, poll_interval=10 * LIMIT)
    assert [type(event) for event in events] == [NodeStarted, Finished]


def test_messages_go_on_after_a_lost_socket(comfy):
    back = asyncio.Event()

    def opened(times):
        if times == 2:
            comfy.serving.loop.call_soon(back.set)
        if times == 1:
            return

    async def script(run):
        run.begin()
        await run.cut()
        await back.wait()
        while run.client not in run.server.sockets:
            await asyncio.sleep(0)
        await run.send("progress", node="1", value=1, max=2)
        await run.end()

    comfy.opened = opened
    events, job = run_one(comfy, script)
    assert events[0] == NodeProgress(job.prompt_id, "1", 1, 2)
    assert isinstance(events[-1], Finished)


def test_a_silent_job_is_asked_for(comfy):
    """Some proxy swallows the messages."""

    async def script(run):
        run.begin()
        while run.server.asked.count(("GET", "/queue")) < 2:
            await asyncio.sleep(0)
        run.leave({"9": {"images": [saved("a.png")]}})

    events, _ = run_one(comfy, script, poll_interval=0.01)
    assert [type(event) for event in events] == [Finished]


def test_a_job_that_the_server_forgot(comfy):
    async def script(run):
        run.server.pending.clear()

    error = ending(comfy, script, poll_interval=0.01)
    assert isinstance(error, JobLost)
    assert "no longer knows job" in str(error)


def test_a_server_that_is_gone_for_good(comfy):
    gone = threading.Event()

    async def script(run):
        run.begin()
        gone.set()

    comfy.script = script

    async def work(client):
        job = await client.submit(PROMPT)
        await asyncio.to_thread(gone.wait, LIMIT)
        await asyncio.to_thread(comfy.serving.stop)
        with pytest.raises(ServerUnreachable, match="cannot be reached"):
            await job.result(LIMIT)
        with pytest.raises(ServerUnreachable):
            await client.submit(PROMPT)
        return True

    assert follow(comfy.url, work, timeout=0.2, poll_interval=0.05)


def test_a_server_that_comes_back_with_its_history(comfy):
    async def script(run):
        run.begin()
        await run.send("execution_start")

    comfy.script = script

    async def work(client):
        job = await client.submit(PROMPT)
        events = job.events(LIMIT)
        assert isinstance(await anext(events), Started)
        await asyncio.to_thread(comfy.serving.stop)
        await asyncio.wait_for(asked_in_vain(client), LIMIT)
        comfy.running.clear()
        comfy.history[job.prompt_id] = {"outputs": {"9": {}}, "status": {"status_str": "success"}}
        await asyncio.to_thread(comfy.serving.start_again)
        comfy.script = complete
        await job.result(LIMIT)
        return await (await client.submit(PROMPT)).result(LIMIT)

    assert follow(comfy.url, work, poll_interval=0.01).kept == [ServerFile("a.png", node="9")]


async def asked_in_vain(client):
    """Wait until a job was asked for at a server that is gone."""
    failed, look_up = asyncio.Event(), client._connection._look_up

    async def watched(job):
        try:
            return await look_up(job)
        except ServerUnreachable:
            failed.set()
            raise

    client._connection._look_up = watched
    await failed.wait()


def test_closing_ends_the_waiting(comfy):
    async def script(run):
        run.begin()

    comfy.script = script

    async def main():
        async with AsyncClient(comfy.url) as client:
            job = await client.submit(PROMPT)
        with pytest.raises(ClientError, match="was closed"):
            await job.result(LIMIT)
        with pytest.raises(ClientError, match="was closed"):
            [event async for event in job.events(LIMIT)]

    asyncio.run(main())


def test_waiting_can_be_limited(comfy):
    go_on = asyncio.Event()

    async def script(run):
        run.begin()
        await go_on.wait()
        await run.end({"9": {"images": [saved("a.png")]}})

    comfy.script = script

    async def work(client):
        job = await client.submit(PROMPT)
        with pytest.raises(JobTimeout, match="it goes on"):
            await job.result(0.01)
        with pytest.raises(TimeoutError):
            [event async for event in job.events(0.01)]
        assert not job.done
        comfy.serving.loop.call_soon_threadsafe(go_on.set)
        return await job.result(LIMIT)

    assert len(follow(comfy.url, work).files) == 1
