"""What holds for every test: one thread, no other machine, and no skips where CI is set, in any number of processes."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONDITIONS = Path(__file__).with_name("conditions.py")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def test_tests_use_the_threads_that_they_say():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


@pytest.mark.parametrize(
    ("setting", "options", "code"), [("1", [], 1), ("", [], 0), ("1", ["-n", "2"], 1), ("", ["-n", "2"], 0)]
)
def test_a_skipped_test_fails_the_run_where_ci_is_set(tmp_path, setting, options, code):
    shutil.copy(CONDITIONS, tmp_path / "conftest.py")
    (tmp_path / "test_one.py").write_text("import pytest\n\ndef test_one():\n    pytest.importorskip('no_such_part')\n")
    (tmp_path / "test_two.py").write_text("def test_two():\n    assert True\n")
    command = [*PYTEST, "--rootdir", tmp_path, tmp_path, *options]
    environment = {**os.environ, "CI": setting}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 passed, 1 skipped" in done.stdout
    assert done.returncode == code, done.stdout


@pytest.mark.parametrize(("path", "code"), [("", 0), ("somewhere", 1)])
def test_only_a_missing_comfyui_may_skip_where_ci_is_set(tmp_path, path, code):
    shutil.copy(CONDITIONS, tmp_path / "conftest.py")
    (tmp_path / "test_one.py").write_text(
        "import pytest\nfrom conftest import NO_COMFYUI\n\n"
        "@pytest.mark.skipif(True, reason=NO_COMFYUI)\ndef test_one():\n    pass\n"
    )
    command = [*PYTEST, "--rootdir", tmp_path, tmp_path]
    environment = {**os.environ, "CI": "1", "COMFYUI_PATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 skipped" in done.stdout
    assert done.returncode == code, done.stdout


def test_no_test_connects_to_another_machine():
    with socket.socket() as connection, pytest.raises(RuntimeError, match=r"to 192\.0\.2\.1"):
        connection.connect(("192.0.2.1", 80))
