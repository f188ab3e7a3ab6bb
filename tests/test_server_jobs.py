"""Queue, history and jobs: what is told of prompts, and what stops them."""

import asyncio
import json

import pytest
from server_kit import Gate, Listener, answer, echo, echo_prompt, finished, node, run, seeded, serving, submit

from stable_cascade_nodes.host.server.queue import history_page

UNKNOWN = "00000000-0000-0000-0000-000000000000"


def shower(shown):
    """An output node that shows `shown`."""
    return node(lambda seed: {"ui": shown}, output=True, seed="INT")


def picture(name, kind="output"):
    return {"filename": name, "subfolder": "", "type": kind}


async def jobs(client, query=""):
    status, body = await answer(client, "GET", f"/api/jobs{query}")
    assert status == 200, body
    return body


async def ids(client, query=""):
    return [job["id"] for job in (await jobs(client, query))["jobs"]]


def test_a_job_from_the_queue_to_its_end(tmp_path):
    async def test():
        gate = Gate()
        nodes = {"Gate": gate.node, "Show": shower({"images": [picture("t.png", "temp"), picture("a.png")]})}
        async with serving(nodes, tmp_path) as client:
            workflow = {"extra_pnginfo": {"workflow": {"id": "w1", "nodes": []}}}
            running = await submit(client, gate.prompt(), extra_data=workflow)
            waiting = await submit(client, seeded("Show"), client_id="me")
            await gate.running()
            _, job = await answer(client, "GET", f"/jobs/{running}")
            created = job.pop("create_time")
            assert isinstance(created, int)
            assert created > 1_500_000_000_000
            assert job == {
                "id": running,
                "status": "in_progress",
                "priority": 0,
                "outputs_count": 0,
                "workflow_id": "w1",
            }
            _, job = await answer(client, "GET", f"/api/jobs/{waiting}")
            assert (job["status"], job["priority"], "workflow_id" in job) == ("pending", 1, False)
            assert isinstance(job["create_time"], int)

            _, queue = await answer(client, "GET", "/queue")
            [[number, prompt_id, prompt, extra_data, outputs]] = queue["queue_running"]
            assert (number, prompt_id, prompt, outputs) == (0, running, gate.prompt(), ["1"])
            assert extra_data["create_time"] == created
            assert [entry[1] for entry in queue["queue_pending"]] == [waiting]
            assert (await answer(client, "GET", "/prompt"))[1] == {"exec_info": {"queue_remaining": 2}}

            gate.opened.set()
            entry = await finished(client, waiting)
            _, job = await answer(client, "GET", f"/jobs/{waiting}")
            start, end = (entry["status"]["messages"][index][1]["timestamp"] for index in (0, -1))
            assert job == {
                "id": waiting,
                "status": "completed",
                "priority": 1,
                "create_time": entry["prompt"][3]["create_time"],
                "execution_start_time": start,
                "execution_end_time": end,
                "outputs_count": 2,
                "preview_output": {**picture("a.png"), "nodeId": "1", "mediaType": "images"},
                "outputs": entry["outputs"],
                "execution_status": entry["status"],
                "workflow": {"prompt": entry["prompt"][2], "extra_data": entry["prompt"][3]},
            }
            listed = (await jobs(client))["jobs"][0]
            assert listed == {
                key: value for key, value in job.items() if key not in ("outputs", "execution_status", "workflow")
            }

    run(test())


@pytest.mark.parametrize(
    ("shown", "count", "preview"),
    [
        ({"text": ["a", "b"]}, 0, None),
        ({"images": [picture("a.png", "temp")]}, 1, ("a.png", "images")),
        ({"audio": [picture("a.flac")], "animated": [True]}, 1, ("a.flac", "audio")),
        ({"files": [picture("a.txt")]}, 1, None),
        ({"images": ["a.png"]}, 0, None),
        ({"images": [picture("a.png", "temp")], "video": [picture("b.mp4")]}, 2, ("b.mp4", "video")),
    ],
)
def test_what_counts_as_an_output(tmp_path, shown, count, preview):
    async def test():
        async with serving({"Show": shower(shown)}, tmp_path) as client:
            prompt_id = await submit(client, seeded("Show"))
            await finished(client, prompt_id)
            _, job = await answer(client, "GET", f"/jobs/{prompt_id}")
            assert job["outputs_count"] == count
            found = job.get("preview_output")
            assert (found and (found["filename"], found["mediaType"])) == preview

    run(test())


def test_jobs_by_status_order_and_page(tmp_path):
    async def test():
        gate = Gate()

        def fail(seed):
            raise ValueError("no")

        nodes = {"Gate": gate.node, "Echo": echo(), "Fail": node(fail, output=True, seed="INT")}
        async with serving(nodes, tmp_path) as client:
            done = [await submit(client, echo_prompt(text)) for text in "abc"]
            failed = await submit(client, seeded("Fail"))
            cancelled = await submit(client, gate.prompt(1))
            await gate.running()
            assert (await answer(client, "POST", f"/jobs/{cancelled}/cancel"))[1] == {"cancelled": True}
            await finished(client, cancelled)
            running = await submit(client, gate.prompt(2), extra_data={"extra_pnginfo": {"workflow": {"id": "w"}}})
            await gate.running()
            waiting = [await submit(client, echo_prompt(text)) for text in "de"]

            everything = [*done, failed, cancelled, running, *waiting]
            assert await ids(client) == everything[::-1]
            assert await ids(client, "?sort_order=asc") == everything
            assert await ids(client, "?status=completed") == done[::-1]
            assert await ids(client, "?status=failed") == [failed]
            assert await ids(client, "?status=cancelled") == [cancelled]
            assert await ids(client, "?status=in_progress,pending") == [*waiting[::-1], running]
            assert await ids(client, "?status=completed,failed,cancelled") == [cancelled, failed, *done[::-1]]
            assert await ids(client, "?status=") == everything[::-1]
            assert await ids(client, "?workflow_id=w") == [running]
            assert await ids(client, "?limit=2&offset=1") == everything[::-1][1:3]
            assert await ids(client, "?offset=-3") == everything[::-1]
            by_time = (await jobs(client, "?status=completed,cancelled&sort_by=execution_duration"))["jobs"]
            times = [job["execution_end_time"] - job["execution_start_time"] for job in by_time]
            assert times == sorted(times, reverse=True)

            for query, page in (
                ("?limit=3", {"offset": 0, "limit": 3, "total": 8, "has_more": True}),
                ("?limit=3&offset=5", {"offset": 5, "limit": 3, "total": 8, "has_more": False}),
                ("?limit=1&offset=0&status=failed", {"offset": 0, "limit": 1, "total": 1, "has_more": False}),
                ("", {"offset": 0, "limit": None, "total": 8, "has_more": False}),
            ):
                assert (await jobs(client, query))["pagination"] == page
            gate.opened.set()

    run(test())


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("status=done", "Invalid status value(s): done. "),
        ("limit=0", "limit must be a positive integer"),
        ("limit=-1", "limit must be a positive integer"),
        ("limit=x", "limit must be an integer"),
        ("offset=x", "offset must be an integer"),
        ("sort_by=name", "sort_by must be 'created_at' or 'execution_duration'"),
        ("sort_order=up", "sort_order must be 'asc' or 'desc'"),
    ],
)
def test_wrong_questions_about_jobs(tmp_path, query, error):
    async def test():
        async with serving({}, tmp_path) as client:
            status, body = await answer(client, "GET", f"/jobs?{query}")
            assert status == 400
            assert body["error"].startswith(error)

    run(test())


def test_unknown_jobs(tmp_path):
    async def test():
        async with serving({}, tmp_path) as client:
            assert await answer(client, "GET", f"/jobs/{UNKNOWN}") == (404, {"error": "Job not found"})
            assert await answer(client, "POST", f"/jobs/{UNKNOWN}/cancel") == (200, {"cancelled": False})
            assert await answer(client, "POST", "/jobs/cancel", json={"job_ids": [UNKNOWN]}) == (
                200,
                {"cancelled": False},
            )
            status, body = await answer(client, "POST", "/jobs/cancel", json={"job_ids": [UNKNOWN, "x", 5]})
            assert (status, body["invalid_ids"]) == (400, ["x", 5])
            for wrong in ({}, {"job_ids": []}, {"job_ids": "x"}, [UNKNOWN]):
                assert (await answer(client, "POST", "/jobs/cancel", json=wrong))[0] == 400

    run(test())


def test_running_and_waiting_jobs_are_cancelled(tmp_path):
    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node, "Echo": echo()}, tmp_path) as client:
            listener = await Listener.open(client, "me")
            running = await submit(client, gate.prompt(1), client_id="me")
            await gate.running()
            first, second, kept = [await submit(client, echo_prompt(text), client_id="me") for text in "abc"]
            assert await answer(client, "POST", f"/jobs/{first}/cancel") == (200, {"cancelled": True})
            body = {"job_ids": [running, second, first]}
            assert await answer(client, "POST", "/jobs/cancel", json=body) == (200, {"cancelled": True})
            await listener.end_of(running)
            await listener.end_of(kept)
            assert await ids(client) == [kept, running]
            entry = await finished(client, running)
            assert entry["status"]["status_str"] == "error"
            assert entry["status"]["messages"][-1][0] == "execution_interrupted"
            assert gate.ran == [1]
            # The next prompts are not interrupted with it.
            gate.opened.set()
            assert (await finished(client, await submit(client, gate.prompt(3))))["status"]["completed"]

    run(test())


@pytest.mark.parametrize(
    ("body", "stops"),
    [
        (b"", True),
        (b"{}", True),
        (b"not json", True),
        (b"[1]", True),
        (b'{"prompt_id": null}', True),
        (b'{"prompt_id": "%s"}', True),
        (b'{"prompt_id": "another"}', False),
    ],
)
def test_interrupt(tmp_path, body, stops):
    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node}, tmp_path) as client:
            prompt_id = await submit(client, gate.prompt())
            await gate.running()
            sent = body.replace(b"%s", prompt_id.encode())
            assert await answer(client, "POST", "/interrupt", data=sent) == (200, None)
            if not stops:
                gate.opened.set()
            entry = await finished(client, prompt_id)
            assert entry["status"]["completed"] is not stops

    run(test())


def test_the_queue_is_cleared_and_thinned(tmp_path):
    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node, "Echo": echo()}, tmp_path) as client:
            running = await submit(client, gate.prompt())
            await gate.running()
            first, second, third = [await submit(client, echo_prompt(text)) for text in "abc"]
            assert await answer(client, "POST", "/queue", json={"delete": [second, "unknown"]}) == (200, None)
            _, queue = await answer(client, "GET", "/queue")
            assert [entry[1] for entry in queue["queue_pending"]] == [first, third]
            assert await answer(client, "POST", "/queue", json={"clear": True}) == (200, None)
            _, queue = await answer(client, "GET", "/queue")
            assert queue["queue_pending"] == []
            assert [entry[1] for entry in queue["queue_running"]] == [running]
            for wrong in ([1], {"delete": "all"}, {"delete": [5]}):
                status, body = await answer(client, "POST", "/queue", json=wrong)
                assert status == 400
                assert body["error"]["message"]
            gate.opened.set()

    run(test())


def test_prompts_run_in_the_order_of_their_numbers(tmp_path):
    async def test():
        gate = Gate()
        order = []
        nodes = {"Gate": gate.node, "Note": node(lambda text: order.append(text), output=True, text="STRING")}
        async with serving(nodes, tmp_path) as client:
            await submit(client, gate.prompt())
            await gate.running()
            for text, more in (
                ("plain", {}),
                ("front", {"front": True}),
                ("late", {"number": 99.5}),
                ("early", {"number": -50}),
                ("last", {}),
            ):
                last = await submit(client, echo_prompt(text, "Note"), **more)
            gate.opened.set()
            await finished(client, last)
            while len(order) < 5:
                await asyncio.sleep(0.005)
            assert order == ["early", "front", "plain", "last", "late"]

    run(test())


@pytest.mark.parametrize("number", ["1", True, [], float("nan"), float("inf"), 10**400])
def test_queue_numbers_that_are_none(tmp_path, number):
    async def test():
        async with serving({"Echo": echo()}, tmp_path) as client:
            body = json.dumps({"prompt": echo_prompt("a"), "number": number})
            status, found = await answer(client, "POST", "/prompt", data=body)
            assert status == 400
            assert found["error"]["type"] == "invalid_prompt"
            assert "queue number" in found["error"]["message"]

    run(test())


def test_history_pages():
    entries = dict.fromkeys("abcde")
    assert list(history_page(entries, None, None)) == list("abcde")
    assert list(history_page(entries, 2, None)) == list("de")
    assert list(history_page(entries, 2, -1)) == list("de")
    assert list(history_page(entries, 9, None)) == list("abcde")
    assert list(history_page(entries, 2, 1)) == list("bc")
    assert list(history_page(entries, None, 3)) == list("de")
    assert list(history_page(entries, 0, None)) == []
    assert list(history_page(entries, -1, None)) == []
    assert list(history_page(entries, -3, 1)) == []
    assert list(history_page(entries, 5, 9)) == []


def test_the_history_is_paged_and_forgotten(tmp_path):
    async def test():
        async with serving({"Echo": echo()}, tmp_path) as client:
            done = [await submit(client, echo_prompt(text)) for text in "abcd"]
            await finished(client, done[-1])
            assert list((await answer(client, "GET", "/history"))[1]) == done
            assert list((await answer(client, "GET", "/api/history?max_items=2"))[1]) == done[2:]
            assert list((await answer(client, "GET", "/history?max_items=2&offset=1"))[1]) == done[1:3]
            assert (await answer(client, "GET", "/history?max_items=x"))[0] == 400
            assert await answer(client, "POST", "/history", json={"delete": [done[0], "unknown"]}) == (200, None)
            assert list((await answer(client, "GET", "/history"))[1]) == done[1:]
            assert await ids(client) == done[:0:-1]
            assert await answer(client, "POST", "/history", json={"clear": True}) == (200, None)
            assert (await answer(client, "GET", "/history"))[1] == {}
            assert await ids(client) == []

    run(test())


def test_the_oldest_entries_are_forgotten(tmp_path):
    async def test():
        async with serving({"Echo": echo()}, tmp_path, history_length=2) as client:
            done = [await submit(client, echo_prompt(text)) for text in "abcd"]
            await finished(client, done[-1])
            assert list((await answer(client, "GET", "/history"))[1]) == done[2:]
            assert await ids(client) == done[:1:-1]

    run(test())


def test_node_classes_and_their_descriptions(tmp_path):
    async def test():
        nodes = {"Echo": echo()}
        titles = {"Echo": "Echo a text"}
        async with serving(
            nodes, tmp_path, node_display_name_mappings=titles, python_module="custom_nodes.pack"
        ) as client:
            _, info = await answer(client, "GET", "/object_info")
            assert set(info) == {"Echo", "LoadImage", "LoadImageMask", "SaveImage", "PreviewImage"}
            assert info["Echo"]["display_name"] == "Echo a text"
            assert info["Echo"]["python_module"] == "custom_nodes.pack"
            assert await answer(client, "GET", "/api/object_info/Echo") == (200, {"Echo": info["Echo"]})
            # Asked anew every time: a folder's files are among the choices.
            (tmp_path / "input").mkdir()
            (tmp_path / "input" / "new.png").touch()
            _, again = await answer(client, "GET", "/object_info/LoadImage")
            assert again["LoadImage"]["input"]["required"]["image"][0] == ["new.png"]

    run(test())
