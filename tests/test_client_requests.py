"""The client: what it asks a server, and what it makes of the answers."""

import asyncio
import uuid

import pytest
from client_kit import (
    LIMIT,
    PROMPT,
    complete,
    fake_comfy,
    follow,
    saved,
)
from comfyui_answers import PROMPT_ANSWERS

from stable_cascade_nodes.host.client import (
    AsyncClient,
    Client,
    ClientError,
    Interrupted,
    JobInterrupted,
    PromptRefused,
    ServerUnreachable,
    UnexpectedAnswer,
)


@pytest.fixture
def comfy():
    with fake_comfy() as fake:
        yield fake


def test_what_is_sent_with_a_prompt(comfy):
    async def work(client):
        job = await client.submit(
            PROMPT, workflow={"nodes": []}, extra_data={"a": 1, "extra_pnginfo": {"b": 2}}, front=True
        )
        await job.result(LIMIT)
        await (await client.submit(PROMPT)).result(LIMIT)
        return job, client.client_id

    job, client_id = follow(comfy.url, work)
    first, second = comfy.bodies
    # Newer servers take nothing but canonical UUIDs.
    assert str(uuid.UUID(job.prompt_id)) == job.prompt_id == first["prompt_id"]
    assert first == {
        "prompt": PROMPT,
        "client_id": client_id,
        "prompt_id": job.prompt_id,
        "extra_data": {"a": 1, "extra_pnginfo": {"b": 2, "workflow": {"nodes": []}}},
        "front": True,
    }
    assert second.keys() == {"prompt", "client_id", "prompt_id", "extra_data"}
    assert second["extra_data"] == {}


def test_a_server_that_chooses_the_ids_itself(comfy):
    async def script(run):
        await complete(run)

    comfy.answer = (200, {"prompt_id": "theirs", "number": 0, "node_errors": {"4": {"errors": []}}})
    comfy.history["theirs"] = {"outputs": {"9": {"images": [saved("b.png")]}}, "status": {"status_str": "success"}}

    async def work(client):
        job = await client.submit(PROMPT)
        return job, await job.result(LIMIT)

    job, result = follow(comfy.url, work)
    assert job.prompt_id == "theirs"
    assert job.node_errors == {"4": {"errors": []}}
    assert result.files[0].filename == "b.png"


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ("unknown_class", ["Cannot execute because node Nope does not exist: Node ID '#1'"]),
        ("no_outputs", ["Prompt has no outputs"]),
        ("no_prompt_key", ["No prompt provided"]),
        ("too_small", ["node #1 (P_Src): Value -1 smaller than min of 0: i"]),
        ("missing_required", ["node #1 (P_Src): Required input is missing: i"]),
    ],
)
def test_a_refused_prompt_says_why(comfy, recorded, words):
    answer = PROMPT_ANSWERS[recorded]
    comfy.answer = (answer["status"], answer["body"])

    async def work(client):
        with pytest.raises(PromptRefused) as caught:
            await client.submit(PROMPT)
        return caught.value

    error = follow(comfy.url, work)
    assert error.problems == words
    assert str(error) == f"{comfy.url} refuses the prompt: {'; '.join(words)}"
    assert error.node_errors == answer["body"]["node_errors"]


def test_a_workflow_of_the_editor_is_refused_without_asking(comfy):
    async def work(client):
        with pytest.raises(ValueError, match=r"Export \(API\)"):
            await client.submit({"nodes": [], "links": []})

    follow(comfy.url, work)
    assert comfy.bodies == []


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (500, "Internal Server Error", r"status 500 \(Internal Server Error\); its log says more"),
        (200, "<html>", "status 200; check that this is the address of a ComfyUI server"),
        (200, "[]", "status 200"),
        (400, "{}", "status 400"),
        (403, "", "status 403;"),
    ],
)
def test_answers_of_other_servers(comfy, status, answer, words):
    comfy.answer = (status, answer)

    async def work(client):
        with pytest.raises(UnexpectedAnswer, match=words) as caught:
            await client.submit(PROMPT)
        return caught.value.status

    assert follow(comfy.url, work) == status


def test_no_server_and_no_comfyui_at_an_address(comfy):
    def main(url):
        with pytest.raises(ClientError) as caught:
            follow(url, None, timeout=5)
        return caught.value

    assert "status 404; check that this is the address" in str(main(f"{comfy.url}/elsewhere"))
    comfy.serving.stop()
    error = main(comfy.url)
    assert isinstance(error, ServerUnreachable)
    assert str(error).startswith(f"{comfy.url} cannot be reached (")
    comfy.serving.start_again()


def test_a_server_that_does_not_answer(comfy):
    async def silent(reader, writer):
        await reader.read()

    async def main():
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ServerUnreachable, match="did not answer in time"):
            async with AsyncClient(f"127.0.0.1:{port}", timeout=0.05):
                pass
        server.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("localhost", "http://localhost"),
        ("http://host:1/", "http://host:1"),
        ("https://host/comfy/", "https://host/comfy"),
        ("http://[::1]:8188", "http://[::1]:8188"),
    ],
)
def test_addresses(given, address):
    assert AsyncClient(given).server == address
    assert Client(given).server == address


@pytest.mark.parametrize("given", ["", "ftp://host", "http://", "http://host:port", "host:99999", "http://host/?a=b"])
def test_what_is_no_address(given):
    with pytest.raises(ValueError, match="is not the address of a server"):
        AsyncClient(given)


def test_a_waiting_job_is_taken_out_of_the_queue(comfy):
    async def script(run):
        pass

    comfy.script = script

    async def work(client):
        job = await client.submit(PROMPT)
        assert await client.queue() == ([], [job.prompt_id])
        await job.cancel()
        with pytest.raises(JobInterrupted, match="taken out of the queue"):
            await job.result(LIMIT)
        events = [event async for event in job.events()]
        await job.cancel()
        return job, events

    job, events = follow(comfy.url, work)
    assert events == [Interrupted(job.prompt_id, None)]
    # Only this job is stopped, should it have begun meanwhile; and an ended job is not cancelled again.
    assert comfy.interrupts == [{"prompt_id": job.prompt_id}]


def test_interrupting_whatever_runs(comfy):
    async def work(client):
        await client.interrupt()

    follow(comfy.url, work)
    assert comfy.interrupts == [{}]


def test_uploads(comfy, tmp_path):
    (tmp_path / 'phöto "one".png').write_bytes(b"pixels")

    async def work(client):
        return [
            await client.upload_image(tmp_path / 'phöto "one".png', subfolder="cats", overwrite=True),
            await client.upload_image(b"bytes", "b.png", type="temp"),
        ]

    first, second = follow(comfy.url, work)
    assert (first.value, second.value) == ('cats/phöto "one".png', "b.png [temp]")
    assert comfy.uploads == [
        ('phöto "one".png', b"pixels", {"type": "input", "subfolder": "cats", "overwrite": "true"}),
        ("b.png", b"bytes", {"type": "temp", "subfolder": "", "overwrite": "false"}),
    ]
    with pytest.raises(ValueError, match="cannot be sent under the name None"):
        follow(comfy.url, lambda client: client.upload_image(b"bytes"))


def test_object_info_and_history(comfy):
    comfy.info = {"A B/c": {"input": {}}, "D": {}}
    comfy.history["1"] = {"outputs": {}}

    async def work(client):
        return [
            await client.object_info(),
            await client.object_info("A B/c"),
            await client.object_info("Nope"),
            await client.history(),
            await client.history("2"),
        ]

    info = {"A B/c": {"input": {}}}
    assert follow(comfy.url, work) == [comfy.info, info, {}, comfy.history, {}]
