"""What can go wrong between a client and a server. Each message is one sentence."""

from __future__ import annotations

from typing import Any

from ..problems import describe_problems


class ClientError(Exception):
    """The server, or the way to it, did not do what was asked."""


class ServerUnreachable(ClientError):
    """No connection to the server, or none any more."""


class UnexpectedAnswer(ClientError):
    """The server answered, but not as a ComfyUI server does; `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class PromptRefused(ClientError, ValueError):
    """The server does not take the prompt.

    `problems` says why, one text per fault; `error` and `node_errors` are the server's own objects.
    """

    def __init__(self, server: str, error: Any, node_errors: Any) -> None:
        self.error = error
        self.node_errors = node_errors
        self.problems = describe_problems(error, node_errors)
        super().__init__(f"{server} refuses the prompt: {'; '.join(self.problems)}")


class ExecutionFailed(ClientError):
    """A node raised an exception on the server."""

    def __init__(
        self, node: str, node_type: str, exception_message: str, exception_type: str, traceback: tuple[str, ...] = ()
    ) -> None:
        reason = exception_message.strip() or exception_type
        super().__init__(f"node #{node} ({node_type}) failed: {reason}")
        self.node = node
        self.node_type = node_type
        self.exception_message = exception_message
        self.exception_type = exception_type
        self.traceback = traceback


class JobInterrupted(ClientError):
    """Somebody stopped the job, or this client took it out of the queue (then `node` is None)."""

    def __init__(self, node: str | None) -> None:
        super().__init__("the job was taken out of the queue" if node is None else f"interrupted in node #{node}")
        self.node = node


class JobTimeout(ClientError, TimeoutError):
    """The job did not end in the time given; it goes on on the server."""


class JobLost(ClientError):
    """The server knows neither the job nor what came of it."""
