"""The client for asyncio."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import aiohttp

from ..graph import Prompt
from ..validation import EDITOR_FORMAT, is_editor_format
from .address import DEFAULT_SERVER, server_address
from .connection import Connection, job_ids
from .errors import PromptRefused, UnexpectedAnswer
from .http import Requests
from .job import AsyncJob
from .results import Download, ServerFile, safe_path

_CHUNK = 1 << 18


class AsyncClient:
    """A connection to a ComfyUI server (0.3.64 or newer), or to the embedded server.

        async with AsyncClient("http://127.0.0.1:8188") as client:
            job = await client.submit(prompt)
            async for event in job.events():
                print(event)
            result = await job.result()
            for file in result.kept:
                print(await client.download(file, "pictures"))

    A connection that breaks is made anew, and jobs that ended meanwhile are found in the server's history.

    server: its address; a path in it is kept. timeout: seconds that a request may take without any progress, and that
    a running job waits for a server that is gone. poll_interval: seconds without any message about a job after which
    the server is asked for it. Every method raises ServerUnreachable or UnexpectedAnswer where the server fails.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, timeout: float = 30.0, poll_interval: float = 5.0) -> None:
        self.server = server_address(server)
        self.client_id = str(uuid.uuid4())
        self._requests = Requests(self.server, timeout)
        self._connection = Connection(self._requests, self.client_id, timeout, poll_interval)

    async def __aenter__(self) -> AsyncClient:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Open the WebSocket on which the server tells what happens; `async with` and `submit` do so."""
        await self._connection.open()

    async def close(self) -> None:
        """Close the connection; jobs go on on the server, and whoever waits for one gets a ClientError."""
        await self._connection.close()
        await self._requests.close()

    async def submit(
        self,
        prompt: Prompt,
        *,
        workflow: dict[str, Any] | None = None,
        extra_data: dict[str, Any] | None = None,
        front: bool = False,
    ) -> AsyncJob:
        """Queue a graph in API format and return its job.

        workflow: the editor's version of the graph, which the server writes into the pictures beside the prompt.
        extra_data: as `POST /prompt` takes it. front: before the other jobs that wait. Raises PromptRefused.
        """
        if is_editor_format(prompt):
            raise ValueError(" ".join(EDITOR_FORMAT))
        await self.connect()
        extra_data = dict(extra_data or {})
        if workflow is not None:
            extra_data["extra_pnginfo"] = {**extra_data.get("extra_pnginfo", {}), "workflow": workflow}
        # The id is chosen here, so that messages which arrive before the answer find their job.
        job = AsyncJob(str(uuid.uuid4()), self.cancel)
        body = {"prompt": prompt, "client_id": self.client_id, "prompt_id": job.prompt_id, "extra_data": extra_data}
        if front:
            body["front"] = True
        with self._connection.expecting(job):
            answer = await self._post_prompt(body)
        if answer["prompt_id"] != job.prompt_id:  # a server that chooses the ids itself
            job = self.job(answer["prompt_id"])
        job.node_errors = answer.get("node_errors") or {}
        return job

    def job(self, prompt_id: str) -> AsyncJob:
        """The job of an id that is known, also one that ended before or that another client queued.

        The server sends the events of a job to the client that queued it; of others only the end is seen.
        """
        job = self._connection.jobs.get(prompt_id)
        if job is None:
            job = AsyncJob(prompt_id, self.cancel)
            job._wake.set()
            self._connection.watch(job)
        return job

    async def cancel(self, prompt_id: str) -> None:
        """Take a job out of the queue, or stop it if it is running; no error where it is neither."""
        job = self._connection.jobs.get(prompt_id)
        if job is not None:
            job._cancelled = True
        # In this order: a job that begins between the two is stopped by the second.
        await self._post("/queue", {"delete": [prompt_id]})
        await self._post("/interrupt", {"prompt_id": prompt_id})
        if job is not None:
            job._wake.set()

    async def interrupt(self) -> None:
        """Stop whatever job is running, whoever queued it."""
        await self._post("/interrupt", {})

    async def upload_image(
        self,
        image: str | os.PathLike[str] | bytes,
        name: str | None = None,
        *,
        subfolder: str = "",
        type: str = "input",
        overwrite: bool = False,
    ) -> ServerFile:
        """Send a picture file, or its bytes under `name`; `value` of the answer is what `LoadImage` takes.

        Where the name is taken by another picture, the server chooses a similar one, unless `overwrite` is set.
        """
        if isinstance(image, bytes):
            content = image
        else:
            content = await asyncio.to_thread(Path(image).read_bytes)
            name = name or Path(image).name
        if not name or not name.isprintable():
            raise ValueError(f"a picture cannot be sent under the name {name!r}; give one such as 'photo.png'")
        # Unquoted, since ComfyUI takes a quoted name as it comes, percent signs and all.
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("image", content, filename=name, content_type="application/octet-stream")
        form.add_field("type", type)
        form.add_field("subfolder", subfolder)
        form.add_field("overwrite", "true" if overwrite else "false")
        answer = await self._requests.json("POST", "/upload/image", data=form)
        try:
            return ServerFile(answer["name"], answer.get("subfolder", ""), answer.get("type", type))
        except (TypeError, KeyError, AttributeError):
            raise self._requests.unexpected("POST", "/upload/image", 200, str(answer).encode()) from None

    async def fetch(self, file: ServerFile) -> bytes:
        """The bytes of a file on the server."""
        status, body = await self._requests.answer("GET", "/view", params=file.query())
        if status != 200:
            raise self._not_there(file, status)
        return body

    async def download(self, file: ServerFile, folder: str | os.PathLike[str]) -> Path:
        """Save a file of the server below `folder`, in its sub-folder there, and return the path.

        The file appears when it is complete, and never outside of `folder`, whatever name the server gives. A file that
        is there stays: the same bytes are not saved twice, others get a number behind the name.
        """
        target = safe_path(Path(folder), file)
        async with self._requests.open("GET", "/view", params=file.query()) as response:
            if response.status != 200:
                raise self._not_there(file, response.status)
            with Download(target) as download:
                async for chunk in response.content.iter_chunked(_CHUNK):
                    download.write(chunk)
                return download.keep()

    async def object_info(self, class_type: str | None = None) -> dict[str, Any]:
        """What the server's nodes take and give, by class; of one class only if named (empty where it is unknown)."""
        path = "/object_info" if class_type is None else f"/object_info/{quote(class_type, safe='')}"
        return await self._requests.json_object(path)

    async def queue(self) -> tuple[list[str], list[str]]:
        """The ids of the running jobs and of the waiting ones."""
        answer = await self._requests.json_object("/queue")
        return job_ids(answer.get("queue_running")), job_ids(answer.get("queue_pending"))

    async def history(self, prompt_id: str | None = None) -> dict[str, Any]:
        """What came of the jobs that ended, by id; of one job only if named (empty where it is unknown)."""
        return await self._requests.json_object(
            "/history" if prompt_id is None else f"/history/{quote(prompt_id, safe='')}"
        )

    # Requests.

    async def _post_prompt(self, body: dict[str, Any]) -> dict[str, Any]:
        status, content = await self._requests.answer("POST", "/prompt", json=body)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            if status == 200 and isinstance(answer.get("prompt_id"), str):
                return answer
            if status == 400 and "error" in answer:
                raise PromptRefused(self.server, answer["error"], answer.get("node_errors"))
        raise self._requests.unexpected("POST", "/prompt", status, content)

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        status, content = await self._requests.answer("POST", path, json=body)
        if status != 200:
            raise self._requests.unexpected("POST", path, status, content)

    def _not_there(self, file: ServerFile, status: int) -> UnexpectedAnswer:
        return UnexpectedAnswer(f"{self.server} does not give the file {file.value!r} (status {status})", status)
