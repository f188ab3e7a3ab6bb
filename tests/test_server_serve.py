"""The command `cascade serve` as a process of its own."""

import contextlib
import http.client
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from stable_cascade_nodes.host import cli, serve

LIMIT = 60


@contextlib.contextmanager
def process(*arguments, **environment):
    command = [sys.executable, "-m", "stable_cascade_nodes.host.cli", "serve", *map(str, arguments)]
    # No screen, so that no test opens a browser unless it brings one.
    hidden = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "BROWSER": "", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **hidden, **environment},
        start_new_session=True,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def url_of(started):
    """Where the server says it is, once it is there."""
    line = started.stdout.readline()
    found = re.fullmatch(r"The editor is at (http://127\.0\.0\.1:(\d+)/\?\S+) \(Ctrl-C stops the server\)\n", line)
    assert found, (line, started.stderr.read() if started.poll() is not None else "")
    return found[1], int(found[2])


def fetch(url):
    with urllib.request.urlopen(url, timeout=LIMIT) as response:
        return response.status, response.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(tmp_path, number):
    with process("--port", 0, "--data", tmp_path) as started:
        url, port = url_of(started)
        base = f"http://127.0.0.1:{port}"
        assert url == f"{base}/?template=text_to_image&source=stable_cascade_nodes"
        status, page = fetch(url)
        assert status == 200
        assert b"<html" in page
        assert fetch(f"{base}/api/workflow_templates/stable_cascade_nodes/text_to_image.json")[0] == 200
        nodes = json.loads(fetch(f"{base}/api/object_info")[1])
        assert nodes["CascadeSampleStageC"]["python_module"] == "custom_nodes.stable_cascade_nodes"
        assert nodes["SaveImage"]["python_module"] == "nodes"
        system = json.loads(fetch(f"{base}/api/system_stats")[1])["system"]
        assert "--disable-api-nodes" in system["argv"]
        assert system["required_frontend_version"] == importlib.metadata.version("comfyui-frontend-package")
        assert 0 < system["ram_free"] <= system["ram_total"]

        started.send_signal(number)
        output, errors = started.communicate(timeout=LIMIT)
        assert started.returncode == 0
        assert output == "stopping\n"
        assert "Traceback" not in errors
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
        # Nothing of its session is left.
        with pytest.raises(ProcessLookupError):
            os.killpg(started.pid, 0)


def test_it_stops_while_somebody_is_connected(tmp_path):
    with process("--port", 0, "--data", tmp_path) as started:
        _, port = url_of(started)
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as client:
            client.sendall(
                f"GET /ws HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            assert b"101 Switching" in client.recv(100)
            started.send_signal(signal.SIGINT)
            _, errors = started.communicate(timeout=LIMIT)
        assert started.returncode == 0
        assert "Traceback" not in errors


def test_it_opens_a_browser_where_there_is_one(tmp_path):
    pipe = tmp_path / "opened"
    os.mkfifo(pipe)
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {pipe}\n')
    browser.chmod(0o755)
    with process("--port", 0, "--data", tmp_path, BROWSER=f"{browser} %s") as started:
        url, _ = url_of(started)
        assert pipe.read_text() == url


@pytest.mark.parametrize(
    ("platform", "environment", "opened"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("darwin", {}, True),
        ("win32", {}, True),
    ],
)
def test_where_there_is_a_browser(monkeypatch, platform, environment, opened):
    urls = []
    monkeypatch.setattr(serve.webbrowser, "open", urls.append)
    monkeypatch.setattr(serve.sys, "platform", platform)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads = []
    start = serve.threading.Thread.start
    monkeypatch.setattr(serve.threading.Thread, "start", lambda self: threads.append(self) or start(self))
    serve._open_browser("http://x")
    for thread in threads:
        thread.join(LIMIT)
    assert urls == (["http://x"] if opened else [])


def test_no_browser_is_opened_when_none_is_wanted(tmp_path):
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f"#!/bin/sh\ntouch {opened}\n")
    browser.chmod(0o755)
    with process("--port", 0, "--data", tmp_path, "--no-browser", BROWSER=f"{browser} %s") as started:
        url_of(started)
        started.send_signal(signal.SIGINT)
        started.communicate(timeout=LIMIT)
    assert not opened.exists()


def test_a_port_in_use_is_said_in_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process("--port", port, "--data", tmp_path) as started:
            output, errors = started.communicate(timeout=LIMIT)
    assert started.returncode == 1
    assert output == ""
    assert errors == (
        f"cascade: 127.0.0.1 port {port} is in use; stop what listens there (ComfyUI?) or give another --port\n"
    )


@pytest.mark.parametrize("place", [("--listen", "203.0.113.1"), ("--port", "70000")])
def test_a_place_where_nobody_can_listen(tmp_path, place):
    with process(*place, "--data", tmp_path) as started:
        _, errors = started.communicate(timeout=LIMIT)
    assert started.returncode == 1
    assert errors.startswith("cascade: cannot listen on ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ({"aiohttp"}, "aiohttp"),
        ({"comfyui_frontend_package"}, "comfyui-frontend-package"),
        ({"aiohttp", "comfyui_frontend_package"}, "aiohttp and comfyui-frontend-package"),
    ],
)
def test_missing_packages_are_named(monkeypatch, capsys, tmp_path, missing, named):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    assert cli.main(["serve", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f'cascade: serve needs {named}; pip install "stable-cascade-nodes[host]"\n'


def test_the_command_line_does_without_the_server_packages():
    code = "import sys, stable_cascade_nodes.host.cli; print('aiohttp' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT)
    assert found.stdout.startswith("False")


@pytest.mark.parametrize(
    ("address", "start"),
    [
        ("127.0.0.1", "http://127.0.0.1:8188/"),
        ("0.0.0.0", "http://127.0.0.1:8188/"),
        ("::", "http://127.0.0.1:8188/"),
        ("::1", "http://[::1]:8188/"),
        ("workstation", "http://workstation:8188/"),
    ],
)
def test_the_url_can_be_opened(address, start):
    assert serve._url(address, 8188).startswith(start)


def test_who_is_let_in_is_said(tmp_path):
    with process("--listen", "0.0.0.0", "--port", 0, "--allow-host", "box.lan", "--data", tmp_path) as started:
        _, port = url_of(started)
        assert "no password" in started.stdout.readline()
        statuses = {}
        for host in ("box.lan", "localhost", "evil.example"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
            connection.request("GET", "/prompt", headers={"Host": host})
            statuses[host] = connection.getresponse().status
            connection.close()
        assert statuses == {"box.lan": 200, "localhost": 200, "evil.example": 403}
        started.send_signal(signal.SIGINT)
        started.communicate(timeout=LIMIT)
