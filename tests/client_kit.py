"""Servers for the tests of clients: any aiohttp application in a thread, and a ComfyUI that follows a script."""

import asyncio
import contextlib
import json
import struct
import threading

import pytest
from aiohttp import WSMsgType, web

from stable_cascade_nodes.host.client import AsyncClient, ClientError

PROMPT = {"1": {"class_type": "Paint", "inputs": {"seed": 3}}}
LIMIT = 60  # seconds after which a test gives up


class Serving:
    """`make_app()`, an aiohttp application, on a free port of this machine while the `with` block lasts."""

    def __init__(self, make_app):
        self._make_app = make_app

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.call(self._start(0))
        return self

    def __exit__(self, *error):
        self.call(self._runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()

    def call(self, work):
        """Run a coroutine on the server's own loop and return what it gives."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def _start(self, port):
        # Sockets are closed by the applications; what is still open then is cut.
        self.app = self._make_app()
        self._runner = web.AppRunner(self.app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.call(self._runner.cleanup())

    def start_again(self):
        """On the same port as before."""
        self.call(self._start(self.port))


class FakeComfy:
    """Answers as ComfyUI 0.3.64 does, as far as a client needs; what a prompt does is told by `script(run)`.

    `asked` lists the requests as (method, path), `bodies` the prompts' requests. `files` are the bytes under
    (type, subfolder, filename).
    """

    def __init__(self, script=None):
        self.script = script or complete
        self.asked, self.bodies, self.uploads, self.features = [], [], [], []
        self.running, self.pending, self.history, self.files, self.info = [], [], {}, {}, {}
        self.interrupts, self.interrupted = [], asyncio.Event()
        self.sockets = {}
        self.tasks = set()
        self.answer = None  # (status, JSON) instead of taking a prompt
        self.opened = None  # called with the number of sockets opened so far; may raise

    def app(self):
        app = web.Application(middlewares=[self._note])
        app.add_routes(
            [
                web.get("/ws", self._socket),
                web.post("/prompt", self._prompt),
                web.get("/queue", self._queue),
                web.post("/queue", self._delete),
                web.post("/interrupt", self._interrupt),
                web.get("/history", self._all_history),
                web.get("/history/{id}", self._history),
                web.get("/view", self._view),
                web.post("/upload/image", self._upload),
                web.get("/object_info", self._all_info),
                web.get("/object_info/{id}", self._info),
            ]
        )
        app.on_shutdown.append(self._close)
        return app

    @web.middleware
    async def _note(self, request, handler):
        self.asked.append((request.method, request.path))
        return await handler(request)

    async def _close(self, app):
        for task in list(self.tasks):
            task.cancel()
        for socket in list(self.sockets.values()):
            await socket.close()

    async def _socket(self, request):
        if self.opened is not None:
            self.opened(self.asked.count(("GET", "/ws")))
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client = request.query["clientId"]
        self.sockets[client] = socket
        await socket.send_json({"type": "status", "data": {"status": {}, "sid": client}})
        async for message in socket:
            if message.type == WSMsgType.TEXT:
                self.features.append(json.loads(message.data))
        if self.sockets.get(client) is socket:
            del self.sockets[client]
        return socket

    async def _prompt(self, request):
        body = await request.json()
        self.bodies.append(body)
        if self.answer is not None:
            status, answer = self.answer
            return web.Response(status=status, text=answer if isinstance(answer, str) else json.dumps(answer))
        run = Run(self, body)
        self.pending.append(run.id)
        task = asyncio.get_running_loop().create_task(self.script(run))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return web.json_response({"prompt_id": run.id, "number": 0, "node_errors": run.node_errors})

    async def _queue(self, request):
        lists = {"queue_running": self.running, "queue_pending": self.pending}
        return web.json_response({name: [[0, id, {}, {}, []] for id in ids] for name, ids in lists.items()})

    async def _delete(self, request):
        for id in (await request.json())["delete"]:
            if id in self.pending:
                self.pending.remove(id)
        return web.Response()

    async def _interrupt(self, request):
        self.interrupts.append(await request.json())
        self.interrupted.set()
        return web.Response()

    async def _history(self, request):
        id = request.match_info["id"]
        return web.json_response({id: self.history[id]} if id in self.history else {})

    async def _all_history(self, request):
        return web.json_response(self.history)

    async def _info(self, request):
        id = request.match_info["id"]
        return web.json_response({id: self.info[id]} if id in self.info else {})

    async def _all_info(self, request):
        return web.json_response(self.info)

    async def _view(self, request):
        content = self.files.get(tuple(request.query.get(name, "") for name in ("type", "subfolder", "filename")))
        if content is None:
            raise web.HTTPNotFound()
        if isinstance(content, bytes):
            return web.Response(body=content)
        # A file that breaks off: the length is announced, the connection cut before the end.
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"half")
        request.transport.close()
        return response

    async def _upload(self, request):
        form = await request.post()
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        self.uploads.append((form["image"].filename, form["image"].file.read(), fields))
        return web.json_response(
            {"name": form["image"].filename, "subfolder": fields["subfolder"], "type": fields["type"]}
        )


class Run:
    """One prompt on a FakeComfy, for its script."""

    def __init__(self, server, body):
        self.server, self.body = server, body
        self.id, self.client = body["prompt_id"], body["client_id"]
        self.node_errors = {}

    def begin(self):
        """From the waiting jobs to the running one."""
        self.server.pending.remove(self.id)
        self.server.running.append(self.id)

    async def send(self, kind, **data):
        socket = self.server.sockets.get(self.client)
        if socket is not None:
            await socket.send_json({"type": kind, "data": {"prompt_id": self.id, **data}})

    async def frame(self, content):
        await self.server.sockets[self.client].send_bytes(content)

    async def cut(self):
        """Lose the client's WebSocket, without a goodbye."""
        socket = self.server.sockets.pop(self.client)
        socket._req.transport.close()

    def leave(self, outputs=None, *, messages=(), status="success"):
        """Out of the queue and into the history."""
        self.server.running = [id for id in self.server.running if id != self.id]
        self.server.pending = [id for id in self.server.pending if id != self.id]
        self.server.history[self.id] = {
            "prompt": [0, self.id, self.body["prompt"], {}, []],
            "outputs": outputs or {},
            "status": {"status_str": status, "completed": status == "success", "messages": list(messages)},
            "meta": {},
        }

    async def end(self, outputs=None, **options):
        self.leave(outputs, **options)
        await self.send("executing", node=None)

    async def fail(self, kind="execution_error", **data):
        """End with an exception in a node, or an interruption."""
        data = {"prompt_id": self.id, "node_id": "1", "node_type": "Paint", "executed": [], **data}
        await self.send(kind, **data)
        await self.end(messages=[[kind, data]], status="error")


async def complete(run):
    """The script of a prompt that saves one picture, without any message on the way."""
    run.begin()
    await run.end({"9": {"images": [saved("a.png")]}})


def saved(filename, subfolder="", type="output"):
    return {"filename": filename, "subfolder": subfolder, "type": type}


def replay(messages, outputs):
    """A script that sends recorded messages, in which PID stands for the prompt's id."""

    async def script(run):
        run.begin()
        for message in messages:
            if message["data"].get("node", "") is None:
                run.leave(outputs)
            text = json.dumps(message).replace('"PID"', json.dumps(run.id)).replace('"CID"', json.dumps(run.client))
            await run.server.sockets[run.client].send_str(text)

    return script


def frame_1(image, kind=1):
    return struct.pack(">II", 1, kind) + image


def frame_4(prompt_id, node, image, **more):
    data = json.dumps({"prompt_id": prompt_id, "node_id": node, "image_type": "image/jpeg", **more}).encode()
    return struct.pack(">II", 4, len(data)) + data + image


@contextlib.contextmanager
def fake_comfy():
    """A FakeComfy that is served; its `url` and its `serving` are attributes."""
    fake = FakeComfy()
    with Serving(fake.app) as serving:
        fake.serving, fake.url = serving, serving.url
        yield fake


def follow(url, work, **options):
    """What `work(client)`, a coroutine function, returns."""

    async def main():
        async with AsyncClient(url, **options) as client:
            return await asyncio.wait_for(work(client), LIMIT)

    return asyncio.run(main())


def run_one(comfy, script, **options):
    """The events of one prompt under `script`, and its job."""
    comfy.script = script

    async def work(client):
        job = await client.submit(PROMPT)
        return [event async for event in job.events(LIMIT)], job

    events, job = follow(comfy.url, work, **options)
    assert {event.prompt_id for event in events} == {job.prompt_id}
    return events, job


def ending(comfy, script, **options):
    """What the result of a prompt raises under `script`."""
    comfy.script = script

    async def work(client):
        job = await client.submit(PROMPT)
        with pytest.raises(ClientError) as caught:
            await job.result(LIMIT)
        return caught.value

    return follow(comfy.url, work, **options)
