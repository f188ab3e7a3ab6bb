"""What a client can do to the others with its socket: nothing."""

import asyncio
import itertools
import socket

import numpy as np
import pytest
from aiohttp import WSMsgType
from PIL import Image
from server_kit import Gate, Listener, echo, echo_prompt, finished, paint_prompt, painter, run, serving, submit

from stable_cascade_nodes.host.server import hub as hub_module


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "no json",
        "[1]",
        "null",
        "[" * 100_000,
        '{"type": 5}',
        '{"type": "feature_flags", "data": [true]}',
        '{"type": "feature_flags"}',
        b"\0" * 100,
    ],
)
def test_what_a_client_sends_is_passed_over(tmp_path, junk):
    async def test():
        async with serving({"Paint": painter([Image.new("RGB", (8, 8))])}, tmp_path) as client:
            listener = await Listener.open(client, "me")
            await (listener.socket.send_bytes if isinstance(junk, bytes) else listener.socket.send_str)(junk)
            await listener.end_of(await submit(client, paint_prompt(), client_id="me"))
            assert [kind for kind, _, _ in listener.previews] == [1]

    run(test())


def test_a_message_too_large_closes_that_socket_alone(tmp_path):
    async def test():
        async with serving({"Echo": echo()}, tmp_path) as client:
            loud, quiet = await Listener.open(client, "loud"), await Listener.open(client, "quiet")
            await loud.socket.send_str("x" * (hub_module._LARGEST_MESSAGE + 1))
            await loud.closed()
            await quiet.end_of(await submit(client, echo_prompt("a"), client_id="quiet"))

    run(test())


async def deaf_client(client, client_id):
    """A socket that has said its WebSocket hello and never reads again."""
    server = client.server
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, (server.host, server.port))
    hello = (
        f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await loop.sock_sendall(connection, hello.encode())
    assert b"101" in await loop.sock_recv(connection, 64)
    return connection


def test_a_client_that_does_not_read_holds_up_nobody_and_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "_WAITING_BYTES_BEFORE_PREVIEWS_STOP", 1_000_000)
    monkeypatch.setattr(hub_module, "_WAITING_BYTES_BEFORE_CLOSE", 4_000_000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))

    async def test():
        nodes = {"Paint": painter([noise] * 30), "Echo": echo()}
        async with serving(nodes, tmp_path) as client:
            deaf = await deaf_client(client, "deaf")
            reader = await Listener.open(client, "reader")
            clients = client.state.hub._clients
            # More than the system buffers: from then on messages wait.
            seeds = itertools.count()
            while clients["deaf"]._waiting_bytes < 1_000_000:
                await finished(client, await submit(client, paint_prompt(next(seeds)), client_id="deaf"))
            # So far behind, it gets no more previews, but stays.
            for _ in range(2):
                await finished(client, await submit(client, paint_prompt(next(seeds)), client_id="deaf"))
            assert clients["deaf"]._waiting_bytes < 2_000_000
            while "deaf" in clients:
                text = f"{next(seeds)} {'x' * 100_000}"
                await finished(client, await submit(client, echo_prompt(text), client_id="deaf"))
            prompt_id = await submit(client, paint_prompt(next(seeds)), client_id="reader")
            await reader.end_of(prompt_id)
            assert reader.types().count("progress") == 30
            assert reader.previews
            deaf.close()

    run(test())


def test_sockets_are_told_that_the_server_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "_CLOSE_TIMEOUT", 0.2)

    async def test():
        gate = Gate()
        async with serving({"Gate": gate.node}, tmp_path) as client:
            listener = await Listener.open(client, "me")
            deaf = await deaf_client(client, "deaf")
            prompt_id = await submit(client, gate.prompt(), client_id="me")
            await gate.running()
            worker = client.state.host
            await client.server.close()
            await listener.closed()
            # The run was interrupted, and its client has heard of it.
            assert listener.types()[-2:] == ["execution_interrupted", "executing"]
            assert listener.messages[-1]["data"] == {"node": None, "prompt_id": prompt_id}
            assert listener.socket.close_code == 1001
            assert worker.closed
            deaf.close()

    run(test())


def test_the_close_of_a_socket_is_noticed(tmp_path):
    async def test():
        async with serving({}, tmp_path) as client:
            listener = await Listener.open(client, "me")
            assert "me" in client.state.hub._clients
            await listener.socket.close()
            assert listener.socket.close_code is not None
            while client.state.hub._clients or client.state.hub._connected:
                await asyncio.sleep(0.005)
            message = await listener.socket.receive()
            assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED)

    run(test())
