"""The conditions that every test runs under, and what a run of tests makes of skipped ones."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SKIPPED = "import pytest\n\n\ndef test_skipped():\n    pytest.skip('for a reason')\n"


def test_tests_use_the_threads_that_they_say():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_a_connection_to_another_machine_is_refused():
    with socket.socket() as one, pytest.raises(RuntimeError, match=r"opened a connection to 192\.0\.2\.1"):
        one.connect(("192.0.2.1", 9))


@pytest.mark.parametrize(("ci", "processes", "code"), [("true", "0", 1), ("true", "2", 1), ("", "2", 0)])
def test_a_skipped_test_fails_the_run_in_ci_only(tmp_path, ci, processes, code):
    (tmp_path / "test_one.py").write_text(SKIPPED)
    command = [sys.executable, "-m", "pytest", "-p", "conditions", "-n", processes, "--dist", "loadfile", str(tmp_path)]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    assert ("so 1 skipped tests count as failed" in done.stdout) == bool(ci)
