"""The thread that runs the queue."""

from __future__ import annotations

import logging
import threading
import time

from ..engine import Host

_log = logging.getLogger(__name__)


class Worker:
    """Runs the prompts of a host one after the other, whatever becomes of each, until it is stopped."""

    def __init__(self, host: Host) -> None:
        self._host = host
        # A node that cannot be interrupted must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="cascade-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Interrupt the running prompt and wait for the thread; says whether it ended within `timeout` seconds."""
        self._host.close()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self._host.closed:
            begun = time.monotonic()
            try:
                prompt_id = self._host.run_next(timeout=None)
            except BaseException:  # a node may raise anything; the queue goes on
                _log.exception("a prompt ended in a way that is no error of a node")
                continue
            if prompt_id is not None:
                self._report(prompt_id, time.monotonic() - begun)

    def _report(self, prompt_id: str, seconds: float) -> None:
        for entry in self._host.history(prompt_id).values():
            kind, data = entry["status"]["messages"][-1]
            if kind == "execution_error":
                where = f"node #{data['node_id']} ({data['node_type']})"
                message = data["exception_message"].strip() or data["exception_type"]
                _log.error("%s failed: %s\n%s", where, message, "".join(data["traceback"]).rstrip())
            else:
                _log.info("prompt %s: %s after %.1f s", prompt_id, kind.removeprefix("execution_"), seconds)
