"""What holds for every test: one thread, the same examples each time, no network, and no skips where CI is set.

The one exception are the tests inside ComfyUI where the environment names no ComfyUI.
"""

import os
import socket
import sys

# Before torch is imported; programs that tests start inherit it. On small models, threads that wait for each other on a
# busy machine cost a hundred times what they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.load_profile("steady")

NO_COMFYUI = "COMFYUI_PATH does not name a ComfyUI checkout"
_LOCAL = ("127.", "::1", "localhost")


def _refuse_network(event, arguments):
    if event != "socket.connect" or arguments[0].family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = str(arguments[1][0])
    if not host.startswith(_LOCAL):
        raise RuntimeError(f"A test opened a connection to {host}, expected none out of this machine.")


sys.addaudithook(_refuse_network)


def _lacks_comfyui(report):
    return not os.environ.get("COMFYUI_PATH") and report.longrepr[2] == f"Skipped: {NO_COMFYUI}"


class _Skips:
    """Collects skipped tests and modules; where the environment variable CI is set, one of them fails the run.

    Not counted is the one reason that is allowed, and only where it is true.
    """

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail") and not _lacks_comfyui(report):
            self.names.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.skipped:
            self.names.append(report.nodeid)

    def pytest_sessionfinish(self, session):
        if self.names and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.names:
            terminalreporter.write_line(f"CI is set, so {len(self.names)} skipped tests count as failed.", red=True)


def pytest_configure(config):
    if os.environ.get("CI"):
        config.pluginmanager.register(_Skips(), "skips")
