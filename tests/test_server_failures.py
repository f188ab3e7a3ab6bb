"""What goes wrong in a node, what holds memory, how the server ends: it goes on serving until it is told to stop."""

import asyncio
import errno
import sys
import threading
import weakref

import pytest
from server_kit import Gate, Listener, answer, echo, echo_prompt, finished, node, run, seeded, serving, submit


def out_of_memory(seed):
    raise MemoryError


def disk_full(seed):
    raise OSError(errno.ENOSPC, "No space left on device", "output/a.png")


def leave(seed):
    sys.exit(3)


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("not even this")


def fail_to_say(seed):
    raise Unprintable


def stop_the_generator(seed):
    raise StopIteration


def interrupt_the_keyboard(seed):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (out_of_memory, "MemoryError"),
        (disk_full, "No space left on device"),
        (leave, "3"),
        (stop_the_generator, "StopIteration"),
        (fail_to_say, "Unprintable"),
        (interrupt_the_keyboard, None),
    ],
)
def test_whatever_a_node_raises_the_server_goes_on(tmp_path, function, message):
    async def test():
        nodes = {"Bad": node(function, output=True, seed="INT"), "Echo": echo()}
        async with serving(nodes, tmp_path) as client:
            listener = await Listener.open(client, "me")
            prompt_id = await submit(client, seeded("Bad"), client_id="me")
            await listener.end_of(prompt_id)
            entry = await finished(client, prompt_id)
            assert entry["status"]["status_str"] == "error"
            assert not entry["status"]["completed"]
            assert (await answer(client, "GET", f"/jobs/{prompt_id}"))[1]["status"] == "failed"
            if message is not None:
                kind, data = entry["status"]["messages"][-1]
                assert (kind, data["node_id"], data["node_type"]) == ("execution_error", "1", "Bad")
                assert message in f"{data['exception_type']} {data['exception_message']}"
                assert data["traceback"]
                told = await listener.until(lambda m: m["type"] == "execution_error")
                assert told["data"] == data
                assert (await answer(client, "GET", "/jobs?status=failed"))[1]["jobs"][0]["execution_error"] == data
            assert (await finished(client, await submit(client, echo_prompt("a"))))["status"]["completed"]

    run(test())


LINKED = {
    "1": {"class_type": "Pass", "inputs": {"text": "a"}},
    "2": {"class_type": "Brittle", "inputs": {"text": ["1", 0]}},
}


@pytest.mark.parametrize("prompt", [echo_prompt("a", "Brittle"), LINKED])
def test_a_class_that_breaks_later_fails_its_prompt_alone(tmp_path, prompt):
    async def test():
        gate = Gate()
        brittle = echo()
        declared = brittle.INPUT_TYPES
        nodes = {"Gate": gate.node, "Brittle": brittle, "Pass": node(lambda text: (text,), text="STRING")}

        async with serving(nodes, tmp_path) as client:
            listener = await Listener.open(client, "me")
            await submit(client, gate.prompt())
            await gate.running()
            prompt_id = await submit(client, prompt, client_id="me")

            def broken(cls):
                raise OSError("the folder is gone")

            brittle.INPUT_TYPES = classmethod(broken)
            gate.opened.set()
            await listener.end_of(prompt_id)
            entry = await finished(client, prompt_id)
            kind, data = entry["status"]["messages"][-1]
            assert (kind, data["node_type"]) == ("execution_error", "Brittle")
            assert "the folder is gone" in data["exception_message"]
            assert listener.types()[-2:] == ["execution_error", "executing"]
            # Nor does it take the other classes' descriptions with it.
            status, info = await answer(client, "GET", "/object_info")
            assert status == 200
            assert "Pass" in info
            assert "Brittle" not in info
            brittle.INPUT_TYPES = declared
            assert (await finished(client, await submit(client, echo_prompt("b", "Brittle"))))["status"]["completed"]

    run(test())


class Model:
    """What a loader returns: large, and kept for the next prompt."""


def model_nodes(made):
    def load(seed):
        model = Model()
        made.append(weakref.ref(model))
        return (model,)

    def use(model):
        return {"ui": {"text": [str(len(made))]}}

    return {"Load": node(load, seed="INT"), "Use": node(use, output=True, model="*")}


MODEL_PROMPT = {
    "1": {"class_type": "Load", "inputs": {"seed": 0}},
    "2": {"class_type": "Use", "inputs": {"model": ["1", 0]}},
}


@pytest.mark.parametrize("body", [{"unload_models": True}, {"free_memory": True}])
def test_free_lets_models_go(tmp_path, body):
    async def test():
        made = []
        async with serving(model_nodes(made), tmp_path) as client:
            await finished(client, await submit(client, MODEL_PROMPT))
            await finished(client, await submit(client, MODEL_PROMPT))
            assert len(made) == 1
            assert made[0]() is not None
            assert await answer(client, "POST", "/free", json={"unload_models": False}) == (200, None)
            await finished(client, await submit(client, MODEL_PROMPT))
            assert len(made) == 1
            assert await answer(client, "POST", "/free", json=body) == (200, None)
            while made[0]() is not None:
                await asyncio.sleep(0.005)
            entry = await finished(client, await submit(client, MODEL_PROMPT))
            assert entry["outputs"]["2"] == {"text": ["2"]}

    run(test())


def test_free_waits_for_the_running_prompt(tmp_path):
    async def test():
        made, gate = [], Gate()
        async with serving({**model_nodes(made), "Gate": gate.node}, tmp_path) as client:
            prompt = {**MODEL_PROMPT, "3": {"class_type": "Gate", "inputs": {"seed": 0}}}
            # The model of this prompt is loaded, and another node of it runs.
            first = await submit(client, prompt)
            second = await submit(client, {**prompt, "4": {"class_type": "Use", "inputs": {"model": ["1", 0]}}})
            await gate.running()
            await answer(client, "POST", "/free", json={"free_memory": True})
            gate.opened.set()
            assert (await finished(client, first))["status"]["completed"]
            await finished(client, second)
            assert len(made) == 2
            assert made[0]() is None

    run(test())


def test_memory_is_given_back_after_it_ran_out(tmp_path):
    async def test():
        made = []
        nodes = {
            **model_nodes(made),
            "Bad": node(lambda model, seed: out_of_memory(seed), output=True, model="*", seed="INT"),
        }
        async with serving(nodes, tmp_path) as client:
            prompt = {
                "1": MODEL_PROMPT["1"],
                "2": {"class_type": "Bad", "inputs": {"model": ["1", 0], "seed": 0}},
            }
            await finished(client, await submit(client, prompt))
            while made[0]() is not None:
                await asyncio.sleep(0.005)

    run(test())


def test_the_worker_stops_with_the_application(tmp_path):
    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node}, tmp_path) as client:
            await submit(client, gate.prompt(1))
            await submit(client, gate.prompt(2))
            await gate.running()
            host = client.state.host
        assert host.closed
        assert gate.ran == [1]

    before = set(threading.enumerate())
    run(test())
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "cascade-worker"]


def test_previews_of_an_earlier_server_are_removed(tmp_path):
    folder = tmp_path / "temp"
    folder.mkdir()
    for name in ("ComfyUI_temp_abcde_00001_.png", "mine.png", "ComfyUI_temp_notes.txt"):
        (folder / name).touch()

    async def test():
        async with serving({}, tmp_path):
            assert sorted(path.name for path in folder.iterdir()) == ["ComfyUI_temp_notes.txt", "mine.png"]

    run(test())
