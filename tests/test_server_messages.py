"""WebSocket messages: who gets which, in what order."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image
from server_kit import (
    Gate,
    Listener,
    answer,
    echo,
    echo_prompt,
    finished,
    node,
    paint_prompt,
    painter,
    run,
    serving,
    submit,
)

from stable_cascade_nodes.host.server import previews as previews_module


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_first_message_names_the_client_and_the_queue(tmp_path):
    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node}, tmp_path) as client:
            named = await Listener.open(client, "me")
            assert named.messages[0]["data"] == {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "me"}
            await submit(client, gate.prompt())
            await gate.running()
            first, second = await Listener.open(client), await Listener.open(client, path="/api/ws")
            assert len(first.client_id) == 32
            assert first.client_id != second.client_id
            assert first.messages[0]["data"]["status"]["exec_info"]["queue_remaining"] == 1
            gate.opened.set()

    run(test())


def test_features_are_exchanged(tmp_path):
    async def test():
        async with serving({}, tmp_path) as client:
            listener = await Listener.open(client)
            await listener.sync()
            assert listener.messages[-1] == {
                "type": "feature_flags",
                "data": {"supports_preview_metadata": True, "max_upload_size": 104857600},
            }
            assert (await answer(client, "GET", "/features"))[1] == listener.messages[-1]["data"]

    run(test())


def test_the_history_is_there_when_a_prompt_ends(tmp_path):
    async def test():
        async with serving({"Echo": echo()}, tmp_path) as client:
            host = client.state.host
            # Asked in the worker's own thread at the very moment of the message.
            known = []
            deliver = host._deliver

            def spy(kind, data, client_id):
                if kind == "executing" and data["node"] is None:
                    known.append(host.history(data["prompt_id"])[data["prompt_id"]]["status"]["completed"])
                    known.append(host.queue_length())
                deliver(kind, data, client_id)

            host._deliver = spy
            listener = await Listener.open(client, "me")
            await listener.end_of(await submit(client, echo_prompt("a"), client_id="me"))
            assert known == [True, 0]

    run(test())


def test_previews_tell_their_node_to_those_who_can_read_it(tmp_path):
    async def test():
        nodes = {"Paint": painter([Image.new("RGB", (16, 8), "red")])}
        async with serving(nodes, tmp_path) as client:
            editor = await Listener.open(client, "editor", metadata=True)
            script = await Listener.open(client, "script")
            # Without a client the progress of a prompt is everybody's.
            prompt_id = await submit(client, paint_prompt())
            await finished(client, prompt_id)
            await editor.sync()
            script_types = []
            while "progress" not in script_types:
                script_types = script.types()
                await asyncio.sleep(0.005)
            [(kind, metadata, picture)] = editor.previews
            assert kind == 4
            assert metadata == {
                "node_id": "7",
                "prompt_id": prompt_id,
                "display_node_id": "7",
                "parent_node_id": None,
                "real_node_id": "7",
                "image_type": "image/jpeg",
            }
            [(kind, image_format, plain_picture)] = script.previews
            assert (kind, image_format) == (1, 1)
            assert picture == plain_picture
            image = opened(picture)
            assert (image.format, image.size) == ("JPEG", (16, 8))
            assert np.abs(np.asarray(image, dtype=int) - [255, 0, 0]).max() < 8
            # In the order of the calls: the state first, then the picture, then the step.
            place = editor.received.index(editor.previews[0])
            assert editor.received[place - 1]["type"] == "progress_state"
            assert editor.received[place + 1]["type"] == "progress"

    run(test())


@pytest.mark.parametrize(
    ("preview", "image_format", "size"),
    [
        (Image.new("RGBA", (8, 8), (0, 0, 255, 0)), "JPEG", (8, 8)),
        (Image.new("L", (1024, 256)), "JPEG", (512, 128)),
        (("PNG", Image.new("RGB", (300, 600)), 100), "PNG", (50, 100)),
        (("JPEG", Image.new("RGB", (48, 24)), 512), "JPEG", (512, 256)),
        (("JPEG", Image.new("RGB", (600, 300)), None), "JPEG", (512, 256)),
    ],
)
def test_previews_of_any_kind(tmp_path, preview, image_format, size):
    async def test():
        async with serving({"Paint": painter([preview])}, tmp_path) as client:
            editor = await Listener.open(client, "editor", metadata=True)
            await editor.end_of(await submit(client, paint_prompt(), client_id="editor"))
            [(_, metadata, picture)] = editor.previews
            assert metadata["image_type"] == f"image/{image_format.lower()}"
            assert (opened(picture).format, opened(picture).size) == (image_format, size)

    run(test())


def test_a_preview_is_encoded_once_and_only_for_somebody(tmp_path, monkeypatch):
    encoded = []
    encode = previews_module._encode
    monkeypatch.setattr(previews_module, "_encode", lambda *args: encoded.append(1) or encode(*args))

    async def test():
        images = [Image.new("RGB", (8, 8)) for _ in range(3)]
        async with serving({"Paint": painter(images)}, tmp_path) as client:
            await finished(client, await submit(client, paint_prompt(0), client_id="nobody"))
            assert encoded == []
            listeners = [await Listener.open(client, metadata=index % 2 == 0) for index in range(4)]
            await finished(client, await submit(client, paint_prompt(1)))
            for listener in listeners:
                await listener.sync()
                assert len(listener.previews) == 3
            assert len(encoded) == 3

    run(test())


def test_a_preview_that_is_no_picture_does_not_stop_the_run(tmp_path):
    async def test():
        async with serving({"Paint": painter(["no picture", Image.new("RGB", (8, 8))])}, tmp_path) as client:
            editor = await Listener.open(client, "editor")
            prompt_id = await submit(client, paint_prompt(), client_id="editor")
            await editor.end_of(prompt_id)
            assert len(editor.previews) == 1
            assert (await finished(client, prompt_id))["status"]["completed"]

    run(test())


def test_messages_of_a_prompt_go_to_its_client_alone(tmp_path):
    async def test():
        async with serving({"Echo": echo()}, tmp_path) as client:
            mine, other = await Listener.open(client, "mine"), await Listener.open(client, "other")
            prompt_id = await submit(client, echo_prompt("a"), client_id="mine")
            await mine.end_of(prompt_id)
            await other.sync()
            assert mine.types() == [
                "execution_start",
                "execution_cached",
                "progress_state",
                "executing",
                "executed",
                "progress_state",
                "execution_success",
                "executing",
            ]
            assert other.types() == []
            lengths = [
                m["data"]["status"]["exec_info"]["queue_remaining"] for m in other.messages if "status" in m["data"]
            ]
            assert lengths == [0, 1, 1, 0]

    run(test())


def test_a_prompt_without_client_tells_everybody_its_progress_and_nothing_else(tmp_path):
    async def test():
        gate = Gate()
        nodes = {"Paint": painter([None, None]), "Gate": gate.node}
        async with serving(nodes, tmp_path) as client:
            listener = await Listener.open(client, "somebody")
            await finished(client, await submit(client, paint_prompt()))
            await listener.sync()
            assert set(listener.types()) == {"progress_state", "progress"}
            # An interruption is everybody's as well.
            prompt_id = await submit(client, gate.prompt())
            await gate.running()
            await answer(client, "POST", "/interrupt", json={"prompt_id": prompt_id})
            told = await listener.until(lambda m: m["type"] == "execution_interrupted")
            assert told["data"]["prompt_id"] == prompt_id
            assert set(listener.types()) == {"progress_state", "progress", "execution_interrupted"}

    run(test())


def test_a_client_that_comes_back_takes_the_run_over(tmp_path):
    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node, "Echo": echo()}, tmp_path) as client:
            old = await Listener.open(client, "me", metadata=True)
            running = await submit(client, gate.prompt(), client_id="me")
            waiting = await submit(client, echo_prompt("next"), client_id="me")
            await gate.running()
            await old.until(lambda m: m["type"] == "executing")
            heard = len(old.received)

            stranger = await Listener.open(client, "stranger")
            new = await Listener.open(client, "me")
            await new.sync()
            state = {"node": "1", "display_node": "1", "prompt_id": running}
            assert new.messages[0]["data"]["status"]["exec_info"]["queue_remaining"] == 2
            assert new.messages[1] == {"type": "executing", "data": state}
            # The old socket goes later than the new one came, as it does when a browser's page is loaded anew.
            await old.socket.close()
            gate.opened.set()
            await new.end_of(running)
            await new.end_of(waiting)
            assert [m["data"]["node"] for m in new.messages if m["type"] == "executing"] == ["1", None, "1", None]
            assert len(old.received) == heard
            assert stranger.types() == []
            # Nothing runs any more, so there is nothing to take over.
            again = await Listener.open(client, "me")
            await again.sync()
            assert again.types() == []

    run(test())


def test_a_queue_outlives_its_client(tmp_path):
    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node, "Echo": echo()}, tmp_path) as client:
            listener = await Listener.open(client, "me")
            ids = [await submit(client, gate.prompt(), client_id="me")]
            ids += [await submit(client, echo_prompt(text), client_id="me") for text in "ab"]
            await gate.running()
            await listener.socket.close()
            gate.opened.set()
            for prompt_id in ids:
                assert (await finished(client, prompt_id))["status"]["completed"]

    run(test())


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        ([float("nan"), float("inf"), -1.5], [None, None, -1.5]),
        ([{1}, np.float32(0.5), {(1, 2): None}, object], [[1], "0.5", {"(1, 2)": None}, "<class 'object'>"]),
    ],
)
def test_results_that_json_has_no_form_for(tmp_path, shown, wanted):
    async def test():
        nodes = {"Odd": node(lambda seed: {"ui": {"text": shown}}, output=True, seed="INT")}
        async with serving(nodes, tmp_path) as client:
            listener = await Listener.open(client, "me")
            prompt_id = await submit(client, {"1": {"class_type": "Odd", "inputs": {"seed": 0}}}, client_id="me")
            told = await listener.until(lambda m: m["type"] == "executed")
            assert told["data"]["output"]["text"] == wanted
            assert (await finished(client, prompt_id))["outputs"]["1"]["text"] == wanted

    run(test())
