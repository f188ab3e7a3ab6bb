"""A job on a server, as an asyncio program follows it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from .errors import ClientError, ExecutionFailed, JobInterrupted, JobLost, JobTimeout
from .events import Event, Failed, Finished, Interrupted, Preview
from .frames import JobMessages, PreviewFrame, outcome_in_history
from .results import Result


class AsyncJob:
    """A prompt in a server's queue; made by `AsyncClient.submit` and `AsyncClient.job`.

    `prompt_id` is its id. `node_errors` holds the server's errors about outputs that it left out; empty is the rule.
    """

    def __init__(self, prompt_id: str, cancel: Callable[[str], Awaitable[None]]) -> None:
        self.prompt_id = prompt_id
        self.node_errors: dict[str, Any] = {}
        self._cancel = cancel
        self._cancelled = False
        self._messages = JobMessages(prompt_id)
        self._unread: deque[Event] = deque()
        self._outcome: Event | ClientError | None = None
        self._news = asyncio.Event()  # an event or the outcome has come
        self._done = asyncio.Event()
        self._wake = asyncio.Event()  # the server should be asked now
        self._heard = False

    @property
    def done(self) -> bool:
        """Whether the job has ended, or is lost."""
        return self._outcome is not None

    async def events(self, timeout: float | None = None) -> AsyncIterator[Event]:
        """What happens to the job, from its beginning, up to one of `Finished`, `Failed` and `Interrupted`.

        For one reader. Who reads slowly sees only the newest preview of a node. Raises JobTimeout where
        the job has not ended after `timeout` seconds, and ServerUnreachable or JobLost where its end cannot be known.
        """
        deadline = None if timeout is None else _now() + timeout
        while True:
            while self._unread:
                yield self._unread.popleft()
            if isinstance(self._outcome, ClientError):
                raise self._outcome
            if self._outcome is not None:
                return
            self._news.clear()
            await self._before(deadline, self._news)

    async def result(self, timeout: float | None = None) -> Result:
        """Wait for the end of the job and return what it made.

        Raises ExecutionFailed, JobInterrupted, JobTimeout (the job goes on), ServerUnreachable or JobLost.
        """
        await self._before(None if timeout is None else _now() + timeout, self._done)
        outcome = self._outcome
        if isinstance(outcome, Finished):
            return outcome.result
        if isinstance(outcome, Failed):
            raise ExecutionFailed(
                outcome.node, outcome.node_type, outcome.message, outcome.exception_type, outcome.traceback
            )
        if isinstance(outcome, Interrupted):
            raise JobInterrupted(outcome.node)
        assert isinstance(outcome, ClientError)
        raise outcome

    async def cancel(self) -> None:
        """Take the job out of the queue, or stop it at the running node's next step. Returns before it has stopped."""
        if not self.done:
            await self._cancel(self.prompt_id)

    async def _before(self, deadline: float | None, event: asyncio.Event) -> None:
        try:
            await asyncio.wait_for(event.wait(), None if deadline is None else max(deadline - _now(), 0))
        except asyncio.TimeoutError:
            if not event.is_set():
                raise JobTimeout(f"job {self.prompt_id} has not ended in the time given; it goes on") from None

    # What the client calls.

    def _receive(self, kind: str, data: dict[str, Any]) -> None:
        self._heard = True
        if self.done:
            return
        for event in self._messages.receive(kind, data):
            self._tell(event)
        if self._messages.ended:
            self._wake.set()

    def _receive_preview(self, frame: PreviewFrame) -> None:
        self._heard = True
        if not self.done:
            self._tell(self._messages.preview(frame))

    @property
    def _running(self) -> bool:
        """Whether a preview that names no job may be this one's."""
        return self._messages.node is not None and not self._messages.ended and not self.done

    def _tell(self, event: Event) -> None:
        if isinstance(event, Preview):
            self._unread = deque(
                other for other in self._unread if not isinstance(other, Preview) or other.node != event.node
            )
        self._unread.append(event)
        self._news.set()

    async def _due(self, silence: float) -> None:
        """Wait until the server should be asked: something says so, or nothing was heard for `silence` seconds."""
        while True:
            self._heard = False
            try:
                await asyncio.wait_for(self._wake.wait(), silence)
            except asyncio.TimeoutError:
                if self._heard:
                    continue
            self._wake.clear()
            return

    def _settle_from(self, queued: bool, entry: dict[str, Any] | None, server: str) -> None:
        """End the job where the server's queue and history say so."""
        messages = self._messages
        if entry is not None:
            self._settle(outcome_in_history(self.prompt_id, entry))
        elif queued:
            return
        elif messages.last is not None:
            self._settle(messages.last)
        elif messages.succeeded:
            # Somebody cleared the history between the last message and our question.
            self._settle(Finished(self.prompt_id, Result(self.prompt_id, dict(messages.outputs))))
        elif self._cancelled:
            self._settle(Interrupted(self.prompt_id, None))
        else:
            self._settle(
                JobLost(
                    f"{server} no longer knows job {self.prompt_id}: it was taken out of the queue, the history was "
                    "cleared, or the server was started anew"
                )
            )

    def _settle(self, outcome: Event | ClientError) -> None:
        if self.done:
            return
        if isinstance(outcome, Event):
            self._tell(outcome)
        self._outcome = outcome
        self._news.set()
        self._done.set()


def _now() -> float:
    return asyncio.get_running_loop().time()
