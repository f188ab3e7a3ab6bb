"""Servers and clients for tests: real HTTP and WebSockets on 127.0.0.1."""

import asyncio
import contextlib
import json
import struct
import threading

from aiohttp import ClientSession, WSMsgType
from aiohttp.test_utils import TestServer

from stable_cascade_nodes.host import ProgressBar, create_app
from stable_cascade_nodes.host.server.app import SERVER
from stable_cascade_nodes.nodes import runtime

LIMIT = 60


def run(coroutine, limit=LIMIT):
    """Run a test's coroutine; a test that waits for what never comes fails."""
    return asyncio.run(asyncio.wait_for(coroutine, limit))


class Client:
    """HTTP to one server (and not aiohttp's own test client, which keeps every answer)."""

    def __init__(self, session, server):
        self._session = session
        self.server = server
        self.state = server.app[SERVER]  # what its routes share
        self.request = session.request
        self.get = session.get
        self.post = session.post
        self.ws_connect = session.ws_connect


@contextlib.asynccontextmanager
async def serving(nodes, data_dir, **options):
    """A client of a fresh server with `nodes`."""
    async with (
        TestServer(create_app(nodes, data_dir, **options)) as server,
        ClientSession(server.make_url("/")) as session,
    ):
        yield Client(session, server)


async def answer(client, method, path, **options):
    """The status and the JSON of an answer (None where it is empty)."""
    async with client.request(method, path, **options) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None


async def submit(client, prompt, **more):
    """Queue a prompt; returns its id."""
    status, body = await answer(client, "POST", "/prompt", json={"prompt": prompt, **more})
    assert status == 200, body
    return body["prompt_id"]


async def finished(client, prompt_id):
    """The history entry of a prompt, once it is there."""
    while True:
        _, entries = await answer(client, "GET", f"/history/{prompt_id}")
        if entries:
            return entries[prompt_id]
        await asyncio.sleep(0.005)


class Listener:
    """A WebSocket client that keeps what it receives: messages as dicts, previews as (kind, metadata, picture)."""

    def __init__(self, socket):
        self.socket = socket
        self.received = []
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, client, client_id=None, *, metadata=False, path="/ws"):
        query = "" if client_id is None else f"?clientId={client_id}"
        listener = cls(await client.ws_connect(path + query))
        first = await listener.until(lambda message: message["type"] == "status")
        listener.client_id = first["data"]["sid"]
        if metadata:
            await listener.sync()
        return listener

    async def _listen(self):
        async for message in self.socket:
            if message.type == WSMsgType.TEXT:
                self.received.append(json.loads(message.data, parse_constant=_refuse_constant))
            elif message.type == WSMsgType.BINARY:
                self.received.append(_preview(message.data))
            async with self._news:
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()

    async def until(self, matches):
        """The first message that `matches`, received already or to come."""
        seen = 0
        async with self._news:
            while True:
                for message in self.received[seen:]:
                    if isinstance(message, dict) and matches(message):
                        return message
                seen = len(self.received)
                assert not self._task.done(), f"the socket closed: {self.socket.close_code}"
                await self._news.wait()

    async def end_of(self, prompt_id):
        """Wait until a prompt of this client has ended."""
        await self.until(lambda m: m["type"] == "executing" and m["data"] == {"node": None, "prompt_id": prompt_id})

    async def sync(self):
        """Wait until everything that the server sent so far is here; announces that previews may carry metadata."""
        known = sum(message.get("type") == "feature_flags" for message in self.messages)
        await self.socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        while sum(message.get("type") == "feature_flags" for message in self.messages) == known:
            async with self._news:
                await self._news.wait()

    async def closed(self):
        await self._task

    @property
    def messages(self):
        return [message for message in self.received if isinstance(message, dict)]

    @property
    def previews(self):
        return [message for message in self.received if not isinstance(message, dict)]

    def types(self):
        """The kinds of messages, in order, without the queue's state and repetitions of it."""
        return [message["type"] for message in self.messages if message["type"] not in ("status", "feature_flags")]

    def take(self):
        """What was received since the last call."""
        taken, self.received = self.received, []
        return taken


def _preview(data):
    kind, second = struct.unpack(">II", data[:8])
    if kind == 4:
        return 4, json.loads(data[8 : 8 + second]), data[8 + second :]
    return kind, second, data[8:]


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def node(function, *, output=False, returns=("*",), **inputs):
    """A node class around a function; inputs are types or (type, options)."""

    def call(self, **arguments):
        return function(**arguments)

    declared = {name: kind if isinstance(kind, tuple) else (kind, {}) for name, kind in inputs.items()}
    members = {
        "RETURN_TYPES": () if output else returns,
        "OUTPUT_NODE": output,
        "FUNCTION": "call",
        "CATEGORY": "test",
        "call": call,
        "INPUT_TYPES": classmethod(lambda cls: {"required": declared}),
    }
    return type("Node", (), members)


class Gate:
    """An output node that runs until the test opens it, and can be interrupted meanwhile."""

    def __init__(self):
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.ran = []
        self.node = node(self._wait, output=True, seed="INT")

    def _wait(self, seed):
        self.ran.append(seed)
        self.entered.set()
        while not self.opened.wait(0.005):
            runtime.check_interrupted()
        runtime.check_interrupted()
        return {"ui": {"text": [str(seed)]}}

    async def running(self):
        """Wait until the node runs."""
        assert await asyncio.to_thread(self.entered.wait, LIMIT)
        self.entered.clear()

    @staticmethod
    def prompt(seed=0):
        return {"1": {"class_type": "Gate", "inputs": {"seed": seed}}}


def echo(**options):
    """An output node that shows its text."""
    return node(lambda text: {"ui": {"text": [text]}}, output=True, text="STRING", **options)


def echo_prompt(text, class_type="Echo"):
    return {"1": {"class_type": class_type, "inputs": {"text": text}}}


def seeded(class_type, seed=0):
    """A prompt of one node with a seed."""
    return {"1": {"class_type": class_type, "inputs": {"seed": seed}}}


def painter(images):
    """An output node that shows `images` as previews, one per step."""

    def paint(seed):
        bar = ProgressBar(len(images))
        for step, image in enumerate(images):
            bar.update_absolute(step + 1, preview=image)
        return {"ui": {"text": ["done"]}}

    return node(paint, output=True, seed="INT")


def paint_prompt(seed=0):
    return {"7": {"class_type": "Paint", "inputs": {"seed": seed}}}
