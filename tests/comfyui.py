"""A ComfyUI checkout for tests: where it is, what runs it, and the pack installed in a folder of its own.

COMFYUI_PATH names the checkout (0.3.64 or newer) and COMFYUI_PYTHON the interpreter that has its requirements, if that
is not the one that runs the tests. Everything is done on the CPU.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from conditions import NO_COMFYUI

ROOT = Path(__file__).parents[1]
PACK = "odd-name.pack"
PARTS = ("nodes", "cascade_ops", "host", "tiny", "workflows", "web", "locales")

needed = pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason=NO_COMFYUI)


def checkout():
    return Path(os.environ["COMFYUI_PATH"]).resolve()


def python():
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


def environment(base):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(base), "COMFYUI_PATH": ""}


def install(base):
    """`base` as ComfyUI's base directory, with a copy of the pack in it, without links and caches."""
    pack = base / "custom_nodes" / PACK
    pack.mkdir(parents=True)
    for part in PARTS:
        shutil.copytree(ROOT / part, pack / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", pack)
    for folder in ("models", "input", "output", "user"):
        (base / folder).mkdir()
    return base


def short(graph):
    """A graph with few steps: enough to take every path."""
    steps = {"CascadeSampleStageC": 5, "CascadeSampleStageB": 3}
    return {
        number: node
        | {"inputs": node["inputs"] | ({"steps": steps[kind]} if (kind := node["class_type"]) in steps else {})}
        for number, node in graph.items()
    }


def graphs():
    """Every graph in API format, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "workflows" / "api").glob("*.json"))}


class Server:
    """ComfyUI's own server in a process of its own, on a free port."""

    LIMIT = 180

    def __init__(self, base):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [python(), "main.py", "--cpu", "--base-directory", str(base), "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--disable-api-nodes", "--preview-method", "auto"],
            cwd=checkout(),
            env=environment(base),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log, self._ready = [], threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.log.append(line)
            if "To see the GUI go to" in line:
                self._ready.set()
        self._ready.set()

    def wait(self):
        """Until it answers."""
        assert self._ready.wait(self.LIMIT) and self._process.poll() is None, "".join(self.log)[-4000:]
        return self.get("/system_stats")

    def stop(self):
        self._process.terminate()
        self._process.wait(60)
        self._reader.join(60)

    def get(self, path, raw=False):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            content = answer.read()
        return content if raw else json.loads(content)

    def post(self, path, body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if content else None
