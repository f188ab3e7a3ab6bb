"""Many clients at once, and many prompts after one another."""

import asyncio
import gc
import tracemalloc

from server_kit import Listener, answer, echo_prompt, finished, node, run, serving, submit

from stable_cascade_nodes.host import ProgressBar

CLIENTS, JOBS_EACH = 20, 10


def work(text):
    ProgressBar(1).update(1)
    return {"ui": {"text": [text]}}


NODES = {"Work": node(work, output=True, text="STRING"), "Text": node(lambda text: (text,), text="STRING")}


def test_every_client_gets_all_of_its_own_messages_and_none_of_anothers(tmp_path):
    per_job = [
        "execution_start",
        "execution_cached",
        "progress_state",
        "executing",
        "progress_state",
        "progress",
        "executed",
        "progress_state",
        "execution_success",
        "executing",
    ]

    async def session(client, number):
        name = f"client{number}"
        listener = await Listener.open(client, name)
        texts = [f"{name} job {job}" for job in range(JOBS_EACH)]
        ids = [await submit(client, echo_prompt(text, "Work"), client_id=name) for text in texts]
        await asyncio.gather(*(listener.end_of(prompt_id) for prompt_id in ids))
        return listener, ids, texts

    async def test():
        async with serving(NODES, tmp_path) as client:
            sessions = await asyncio.gather(*(session(client, number) for number in range(CLIENTS)))
            for listener, ids, texts in sessions:
                await listener.sync()
                own = [m for m in listener.messages if m["type"] not in ("status", "feature_flags")]
                # One prompt at a time and in the order of the queue, so its messages follow one another.
                assert [m["type"] for m in own] == per_job * JOBS_EACH
                assert [m["data"]["prompt_id"] for m in own] == [name for name in ids for _ in per_job]
                assert [m["data"]["output"]["text"] for m in own if m["type"] == "executed"] == [[t] for t in texts]
                for prompt_id, text in zip(ids, texts, strict=True):
                    entry = await finished(client, prompt_id)
                    assert entry["outputs"] == {"1": {"text": [text]}}
            everything = [prompt_id for _, ids, _ in sessions for prompt_id in ids]
            _, history = await answer(client, "GET", "/history")
            assert sorted(history) == sorted(everything)
            assert len(history) == CLIENTS * JOBS_EACH
            _, page = await answer(client, "GET", "/jobs?status=completed&limit=1")
            assert page["pagination"]["total"] == CLIENTS * JOBS_EACH
            assert client.state.host.queue_length() == 0

    run(test())


def test_memory_stays_flat_over_a_thousand_prompts(tmp_path):
    kept = 20

    async def batch(client, listener, numbers):
        for number in numbers:
            # What a prompt holds on to would show: each carries 10 kB of its own from node to node.
            prompt = {
                "1": {"class_type": "Text", "inputs": {"text": f"{number} " * 2000}},
                "2": {"class_type": "Work", "inputs": {"text": ["1", 0]}},
            }
            await listener.end_of(await submit(client, prompt, client_id="me"))
            listener.take()

    async def size():
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async def test():
        async with serving(NODES, tmp_path, history_length=kept) as client:
            listener = await Listener.open(client, "me")
            await batch(client, listener, range(100))
            before = await size()
            await batch(client, listener, range(1000, 2000))
            grown = await size() - before
            _, history = await answer(client, "GET", "/history")
            assert len(history) == kept
            # A thousand times 10 kB would be 10 MB.
            assert grown < 300_000

    tracemalloc.start()
    try:
        run(test())
    finally:
        tracemalloc.stop()
