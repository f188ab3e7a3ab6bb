"""The WebSocket of a client, and the jobs that it waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import aiohttp

from .errors import ClientError, ServerUnreachable
from .frames import read_message, read_preview
from .http import UNREACHABLE, Requests
from .job import AsyncJob

# A preview may be a whole picture; what is larger is no message of a ComfyUI server.
_LARGEST_MESSAGE = 256 * 1024 * 1024
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0  # seconds
_LONGEST_GOODBYE = 1.0
_FEATURES = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}


class Connection:
    """Hands the server's messages to `jobs`, opens the WebSocket anew where it breaks, asks after silent jobs."""

    def __init__(self, requests: Requests, client_id: str, timeout: float, poll_interval: float) -> None:
        self.jobs: dict[str, AsyncJob] = {}
        self._requests = requests
        self._client_id = client_id
        self._timeout = timeout
        self._poll_interval = poll_interval
        self._listener: asyncio.Task[None] | None = None
        self._watches: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect, unless that was done; ClientError where it fails."""
        if self._listener is None:
            socket = await self._open_socket()
            self._listener = asyncio.create_task(self._listen(socket))

    async def close(self) -> None:
        """Stop listening; jobs that have not ended are told so."""
        tasks = [*self._watches, *([] if self._listener is None else [self._listener])]
        self._listener = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @contextlib.contextmanager
    def expecting(self, job: AsyncJob) -> Iterator[None]:
        """Let `job` receive messages from now on; it is watched if the block ends well, and forgotten if not."""
        self.jobs[job.prompt_id] = job
        try:
            yield
        except BaseException:
            del self.jobs[job.prompt_id]
            raise
        self.watch(job)

    def watch(self, job: AsyncJob) -> None:
        """Follow `job` to its end."""
        self.jobs[job.prompt_id] = job
        watch = asyncio.create_task(self._watch(job))
        self._watches.add(watch)

        def through(task: asyncio.Task[None]) -> None:
            self._watches.discard(task)
            self.jobs.pop(job.prompt_id, None)
            job._settle(ClientError(f"the client was closed before job {job.prompt_id} ended"))

        watch.add_done_callback(through)

    async def _watch(self, job: AsyncJob) -> None:
        clock = asyncio.get_running_loop().time
        failing_since: float | None = None
        while not job.done:
            await job._due(self._poll_interval if failing_since is None else _FIRST_PAUSE)
            try:
                queued, entry = await self._look_up(job)
            except ClientError as error:
                failing_since = clock() if failing_since is None else failing_since
                if clock() - failing_since >= self._timeout:
                    job._settle(error)
                continue
            failing_since = None
            job._settle_from(queued, entry, self._requests.address)

    async def _look_up(self, job: AsyncJob) -> tuple[bool, dict[str, Any] | None]:
        """Whether a job is in the queue, and its entry in the history."""
        queued = False
        if not job._messages.ended:
            # The queue first: a job that ends between the two questions is found by the second.
            queue = await self._requests.json_object("/queue")
            queued = job.prompt_id in job_ids(queue.get("queue_running")) + job_ids(queue.get("queue_pending"))
        history = await self._requests.json_object(f"/history/{quote(job.prompt_id, safe='')}")
        entry = history.get(job.prompt_id)
        return queued, entry if isinstance(entry, dict) else None

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            try:
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.ERROR:
                        break
                    self._dispatch(message.data)
            finally:
                await _close(socket)
            socket = await self._open_again()
            for job in self.jobs.values():
                job._wake.set()

    async def _open_again(self) -> aiohttp.ClientWebSocketResponse:
        """A new socket, however long it takes: jobs give up by themselves, and the client may be closed."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self._open_socket()
            except ClientError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _open_socket(self) -> aiohttp.ClientWebSocketResponse:
        address, path = self._requests.address, "/ws"
        connecting = self._requests.session().ws_connect(
            address + path,
            params={"clientId": self._client_id},
            heartbeat=self._timeout,
            max_msg_size=_LARGEST_MESSAGE,
        )
        try:
            socket = await asyncio.wait_for(connecting, self._timeout)
        except aiohttp.WSServerHandshakeError as error:
            raise self._requests.unexpected("GET", path, error.status, b"") from error
        except UNREACHABLE as error:
            raise self._requests.unreachable(error) from error
        try:
            await socket.send_json(_FEATURES)
            # The server's first message says that it has noted the client.
            first = await asyncio.wait_for(socket.receive(), self._timeout)
            if first.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                raise ServerUnreachable(f"{address} closed the WebSocket at once; its log says more")
        except BaseException as error:
            await _close(socket)
            if isinstance(error, UNREACHABLE):
                raise self._requests.unreachable(error) from error
            raise
        self._dispatch(first.data)
        return socket

    def _dispatch(self, content: Any) -> None:
        if isinstance(content, bytes):
            self._dispatch_preview(content)
        elif isinstance(content, str) and (message := read_message(content)) is not None:
            kind, data = message
            prompt_id = data.get("prompt_id")
            job = self.jobs.get(prompt_id) if isinstance(prompt_id, str) else None
            if job is not None:
                job._receive(kind, data)

    def _dispatch_preview(self, content: bytes) -> None:
        frame = read_preview(content)
        if frame is None:
            return
        if frame.prompt_id is not None:
            jobs = [self.jobs[frame.prompt_id]] if frame.prompt_id in self.jobs else []
        else:
            # A server runs one job at a time and sends previews to the client that queued it.
            jobs = [job for job in self.jobs.values() if job._running][-1:]
        for job in jobs:
            job._receive_preview(frame)


async def _close(socket: aiohttp.ClientWebSocketResponse) -> None:
    """Say goodbye, but do not wait long for the answer: the server may be gone."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(socket.close(), _LONGEST_GOODBYE)


def job_ids(entries: Any) -> list[str]:
    """The ids in a list of the queue, `[[number, id, ...], ...]`."""
    return [
        entry[1]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, list) and len(entry) > 1 and isinstance(entry[1], str)
    ]
