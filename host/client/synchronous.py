"""The client for programs without asyncio: the same methods, which wait for their answers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..graph import Prompt
from .address import DEFAULT_SERVER
from .asynchronous import AsyncClient
from .errors import ClientError
from .events import Event
from .job import AsyncJob
from .results import Result, ServerFile

_T = TypeVar("_T")


class Client:
    """A connection to a ComfyUI server (0.3.64 or newer), or to the embedded server.

        with Client("http://127.0.0.1:8188") as client:
            job = client.submit(prompt)
            for event in job.events():
                print(event)
            for file in job.result().kept:
                print(client.download(file, "pictures"))

    Arguments, methods and errors are those of `AsyncClient`. A thread of its own does the work, so a client may be used
    from several threads.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, timeout: float = 30.0, poll_interval: float = 5.0) -> None:
        self._client = AsyncClient(server, timeout=timeout, poll_interval=poll_interval)
        self.server, self.client_id = self._client.server, self._client.client_id
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Client:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Open the WebSocket on which the server tells what happens; `with` does so."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="cascade-client", daemon=True)
            self._thread.start()
        self._wait(self._client.connect())

    def close(self) -> None:
        """Close the connection; jobs go on on the server, and whoever waits for one gets a ClientError."""
        if self._loop is not None:
            self._wait(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def submit(
        self,
        prompt: Prompt,
        *,
        workflow: dict[str, Any] | None = None,
        extra_data: dict[str, Any] | None = None,
        front: bool = False,
    ) -> Job:
        """Queue a graph in API format and return its job; see `AsyncClient.submit`."""
        return Job(self, self._wait(self._client.submit(prompt, workflow=workflow, extra_data=extra_data, front=front)))

    def job(self, prompt_id: str) -> Job:
        """The job of an id that is known; see `AsyncClient.job`."""

        async def find() -> AsyncJob:
            return self._client.job(prompt_id)

        return Job(self, self._wait(find()))

    def cancel(self, prompt_id: str) -> None:
        """Take a job out of the queue, or stop it if it is running; no error where it is neither."""
        self._wait(self._client.cancel(prompt_id))

    def interrupt(self) -> None:
        """Stop whatever job is running, whoever queued it."""
        self._wait(self._client.interrupt())

    def upload_image(
        self,
        image: str | os.PathLike[str] | bytes,
        name: str | None = None,
        *,
        subfolder: str = "",
        type: str = "input",
        overwrite: bool = False,
    ) -> ServerFile:
        """Send a picture file, or its bytes under `name`; `value` of the answer is what `LoadImage` takes."""
        return self._wait(self._client.upload_image(image, name, subfolder=subfolder, type=type, overwrite=overwrite))

    def fetch(self, file: ServerFile) -> bytes:
        """The bytes of a file on the server."""
        return self._wait(self._client.fetch(file))

    def download(self, file: ServerFile, folder: str | os.PathLike[str]) -> Path:
        """Save a file of the server below `folder` and return the path; see `AsyncClient.download`."""
        return self._wait(self._client.download(file, folder))

    def object_info(self, class_type: str | None = None) -> dict[str, Any]:
        """What the server's nodes take and give, by class; of one class only if named (empty where it is unknown)."""
        return self._wait(self._client.object_info(class_type))

    def queue(self) -> tuple[list[str], list[str]]:
        """The ids of the running jobs and of the waiting ones."""
        return self._wait(self._client.queue())

    def history(self, prompt_id: str | None = None) -> dict[str, Any]:
        """What came of the jobs that ended, by id; of one job only if named (empty where it is unknown)."""
        return self._wait(self._client.history(prompt_id))

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop is None:
            work.close()
            raise ClientError("the client is not connected; use it in a with block, or call connect() first")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, which the work must not outlive
            future.cancel()
            raise


class Job:
    """A prompt in a server's queue; made by `Client.submit` and `Client.job`."""

    def __init__(self, client: Client, job: AsyncJob) -> None:
        self._client = client
        self._job = job

    @property
    def prompt_id(self) -> str:
        return self._job.prompt_id

    @property
    def node_errors(self) -> dict[str, Any]:
        """The server's errors about outputs that it left out; empty is the rule."""
        return self._job.node_errors

    @property
    def done(self) -> bool:
        """Whether the job has ended, or is lost."""
        return self._job.done

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """What happens to the job, from its beginning to its end; see `AsyncJob.events`."""
        events = self._job.events(timeout)

        async def following() -> Event | None:
            return await anext(events, None)

        while (event := self._client._wait(following())) is not None:
            yield event

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end of the job and return what it made; see `AsyncJob.result`."""
        return self._client._wait(self._job.result(timeout))

    def cancel(self) -> None:
        """Take the job out of the queue, or stop it at the running node's next step. Returns before it has stopped."""
        self._client._wait(self._job.cancel())
