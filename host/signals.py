"""What a node can say to the executor besides its results."""


class ExecutionBlocker:
    """A value that keeps every node that receives it from running.

    With a `message` the client is told so as an error of the blocked node; without one the branch just stays silent.
    The rest of the graph runs on.
    """

    def __init__(self, message: str | None = None) -> None:
        self.message = message


class RunInterrupted(Exception):
    """The user stopped the run; raised inside the running node at its next progress report or check."""
