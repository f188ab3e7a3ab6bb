"""Requests that try to leave the data folders: nothing outside is read, written, moved or deleted."""

import asyncio
import itertools
import json
import os
import urllib.parse
from pathlib import Path

import pytest
from server_kit import run, serving

from stable_cascade_nodes.host.server import files
from stable_cascade_nodes.host.server.context import Pack

SECRET = b"the secret of the other folder"
PART = "=part="

# Names as a client may write them into a URL, a form or JSON; OUTSIDE is the folder with the secret.
NAMES = [
    "../secret.txt",
    "../../secret.txt",
    "../../../secret.txt",
    "../../../../secret.txt",
    "a/../../secret.txt",
    "sub/../../../secret.txt",
    "./../secret.txt",
    "....//secret.txt",
    "..;/secret.txt",
    "..",
    ".",
    "",
    "/",
    "OUTSIDE/secret.txt",
    "//OUTSIDE/secret.txt",
    "/etc/passwd",
    "~/secret.txt",
    "file://OUTSIDE/secret.txt",
    "file:///etc/passwd",
    "..\\secret.txt",
    "..\\..\\secret.txt",
    "sub\\..\\..\\secret.txt",
    "\\secret.txt",
    "\\\\server\\share\\secret.txt",
    "C:\\secret.txt",
    "C:/secret.txt",
    "C:secret.txt",
    "\\\\?\\C:\\secret.txt",
    "%2e%2e%2fsecret.txt",
    "%2e%2e/secret.txt",
    "..%2fsecret.txt",
    "..%5csecret.txt",
    "%252e%252e%252fsecret.txt",
    "..%c0%afsecret.txt",
    "\uff0e\uff0e/secret.txt",
    "..\uff0fsecret.txt",
    "secret.txt\0.png",
    "\0../secret.txt",
    "../secret.txt\0",
    "a\r\nSet-Cookie: x",
    "a\nb",
    "link.txt",
    "link/secret.txt",
    "link/../secret.txt",
    "sub/link.txt",
    "link",
    "loop",
    "loop/x",
    "dangling.txt",
    "CON",
    "nul.txt",
    "COM1.png",
    "aux /x",
    "a.txt::$DATA",
    "a.txt:stream",
    "a.txt.",
    "a.txt ",
    "x" * 300,
    ("x" * 200 + "/") * 21 + "x",
    "{a}",
    "*",
    "?",
    "\udcff",
]


@pytest.fixture
def place(tmp_path):
    """A data folder in a folder with a secret, and links in it that lead out."""
    secrets = [tmp_path / "secret.txt", tmp_path / "outside" / "secret.txt", tmp_path / "outside" / "secret.json"]
    for secret in secrets:
        secret.parent.mkdir(exist_ok=True)
        secret.write_bytes(SECRET)
    data = tmp_path / "data"
    pack = tmp_path / "pack"
    bases = [data / kind for kind in ("input", "output", "temp", "models/vae")]
    bases += [data / "user" / "default", pack / "web", pack / "templates", tmp_path / "static"]
    for base in bases:
        (base / "sub").mkdir(parents=True)
        (base / "a.txt").write_text("a file")
        for link, target in {
            "link.txt": "outside/secret.txt",
            "sub/link.txt": "outside/secret.txt",
            "link.json": "outside/secret.json",
            "link.safetensors": "outside/secret.txt",
            "link": "outside",
            "dangling.txt": "outside/made.txt",
        }.items():
            (base / link).symlink_to(tmp_path / target)
        (base / "loop").symlink_to(base / "loop")
    return data, {"packs": [Pack("p", pack / "web", pack / "templates")], "frontend": tmp_path / "static"}


def outside(data):
    """Everything beside the data folder, and the data folder's root: path -> kind and content."""
    found = {}
    for directory, folders, names in os.walk(data.parent):
        if directory == str(data):
            found[directory] = sorted(folders), sorted(names)
            folders[:] = []
            continue
        for path in (Path(directory, name) for name in folders + names):
            if path.is_symlink():
                found[path] = os.readlink(path)
            else:
                found[path] = path.read_bytes() if path.is_file() else None
    return found


def quoted(name):
    return urllib.parse.quote(name.encode("utf-8", "surrogateescape"), safe="")


def spellings(name):
    """How a name may stand in a URL: quoted once, twice, and not more than a request line needs."""
    return dict.fromkeys(
        [quoted(name), quoted(quoted(name)), urllib.parse.quote(name, safe="/.\\:%;", errors="replace")]
    )


def form(fields):
    """A form with names as they are; aiohttp's own would quote them."""
    parts = []
    for name, file_name, value in fields:
        disposition = f'form-data; name="{name}"' + ("" if file_name is None else f'; filename="{file_name}"')
        parts.append(f"--{PART}\r\nContent-Disposition: {disposition}\r\n\r\n{value}\r\n")
    return "".join([*parts, f"--{PART}--\r\n"]).encode("utf-8", "surrogateescape")


def reads(spelled):
    for kind in ("input", "output", "temp"):
        yield "GET", f"/view?filename={spelled}&type={kind}"
        yield "GET", f"/view?filename=secret.txt&subfolder={spelled}&type={kind}"
    yield "GET", f"/view?filename={spelled}%20[input]"
    yield "GET", f"/view?filename={spelled}&type=input&preview=webp;90"
    yield "GET", f"/view?filename={spelled}&type=input&channel=rgb"
    yield "GET", f"/view?filename=a.txt&type={spelled}"
    yield "GET", f"/userdata/{spelled}"
    yield "GET", f"/userdata?dir={spelled}&recurse=true&full_info=true"
    yield "GET", f"/v2/userdata?path={spelled}"
    yield "GET", f"/settings/{spelled}"
    yield "GET", f"/models/{spelled}"
    yield "GET", f"/view_metadata/vae?filename={spelled}"
    yield "GET", f"/view_metadata/{spelled}?filename=secret.safetensors"
    yield "GET", f"/internal/files/{spelled}"
    yield "GET", f"/extensions/p/{spelled}"
    yield "GET", f"/extensions/{spelled}/secret.txt"
    yield "GET", f"/extensions/core/{spelled}"
    yield "GET", f"/workflow_templates/p/{spelled}"
    yield "GET", f"/workflow_templates/p/{spelled}.json"
    yield "GET", f"/workflow_templates/{spelled}/secret.json"
    yield "GET", f"/templates/{spelled}"
    yield "GET", f"/{spelled}"
    yield "GET", f"/assets/{spelled}"


def writes(spelled):
    yield "POST", f"/userdata/{spelled}"
    yield "POST", f"/userdata/{spelled}?overwrite=false"
    yield "POST", f"/userdata/a.txt/move/{spelled}"
    yield "POST", f"/userdata/{spelled}/move/taken.txt"
    yield "POST", f"/settings/{spelled}"
    yield "DELETE", f"/userdata/{spelled}"


def uploads(name):
    reference = {"filename": name, "type": "input", "subfolder": ""}
    for overwrite in ("true", "false"):
        yield "/upload/image", [("image", name, "new"), ("overwrite", None, overwrite)]
        yield (
            "/upload/image",
            [("image", "secret.txt", "new"), ("subfolder", None, name), ("overwrite", None, overwrite)],
        )
    yield "/upload/image", [("image", "secret.txt", "new"), ("type", None, name)]
    yield "/upload/mask", [("image", "m.png", "new"), ("original_ref", None, json.dumps(reference))]
    reference = {"filename": "secret.txt", "type": "input", "subfolder": name}
    yield "/upload/mask", [("image", "m.png", "new"), ("original_ref", None, json.dumps(reference))]


class Wire:
    """Requests as raw bytes, on a connection that is opened anew where the server closed it."""

    def __init__(self, port):
        self._port = port
        self._streams = None

    async def send(self, method, path, body=b"", content_type=""):
        """The status and everything that came back."""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        head += f"Content-Type: {content_type}\r\n" if content_type else ""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(head.encode("utf-8", "surrogateescape") + b"\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:-2])
        assert b"set-cookie" not in headers
        if int(answer.split()[1]) not in (204, 304):
            answer += await reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection") == b"close":
            writer.close()
            self._streams = None
        return int(answer.split()[1]), answer


async def attack(place, requests):
    """Send `(method, path, body, content type)` to a server; the status of each, with nothing got out or in."""
    data, options = place
    before = outside(data)
    statuses = []
    async with serving({}, data, **options) as client:
        wire = Wire(client.server.port)
        for request in requests:
            status, answer = await wire.send(*request)
            assert SECRET not in answer, request
            assert status < 500, (request, answer)
            statuses.append((request, status))
        assert outside(data) == before
        # It still serves.
        assert (await wire.send("GET", "/queue"))[0] == 200
    return statuses


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_nothing_outside_is_read(place, name):
    name = name.replace("OUTSIDE", str(place[0].parent / "outside"))
    requests = [(method, path) for spelled in spellings(name) for method, path in reads(spelled)]
    requests += [(method, f"/api{path}") for method, path in requests if path.startswith(("/view?", "/userdata"))]
    run(attack(place, requests))


@pytest.mark.filterwarnings("ignore::aiohttp.multipart.BadContentDispositionHeader")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_nothing_outside_is_written(place, name):
    name = name.replace("OUTSIDE", str(place[0].parent / "outside"))
    requests = [(method, path, b"1") for spelled in spellings(name) for method, path in writes(spelled)]
    for path, fields in itertools.chain(uploads(name), uploads(quoted(name))):
        requests.append(("POST", path, form(fields), f"multipart/form-data; boundary={PART}"))
    run(attack(place, requests))


@pytest.mark.parametrize("name", ["link.txt", "sub/link.txt", "link/secret.txt", "link.json", "dangling.txt"])
def test_links_that_lead_out_are_refused(place, name):
    spelled = quoted(name)
    requests = [
        ("GET", f"/view?filename={spelled}&type=input"),
        ("GET", f"/userdata/{spelled}"),
        ("GET", f"/extensions/p/{spelled}"),
        ("GET", f"/{spelled}"),
        ("POST", f"/userdata/{spelled}", b"new"),
        ("POST", f"/userdata/a.txt/move/{spelled}"),
        ("DELETE", f"/userdata/{spelled}"),
    ]
    statuses = [status for _, status in run(attack(place, requests))]
    assert statuses == [403, 404, 404, 404, 403, 403, 404]


def test_links_that_lead_out_are_not_listed(place):
    data, options = place

    async def scenario():
        async with serving({}, data, **options) as client:
            given = {}
            for path in ("/userdata?dir=.&recurse=true", "/v2/userdata", "/internal/files/input"):
                async with client.get(path) as response:
                    given[path] = await response.json()
            return given

    given = run(scenario())
    assert given["/userdata?dir=.&recurse=true"] == ["a.txt"]
    assert [entry["path"] for entry in given["/v2/userdata"]] == ["sub", "a.txt"]
    assert given["/internal/files/input"] == ["a.txt"]


def test_links_that_stay_inside_are_followed(place):
    data, _ = place
    (data / "input" / "other.txt").symlink_to(data / "input" / "a.txt")
    [(_, status)] = run(attack(place, [("GET", "/view?filename=other.txt&type=input")]))
    assert status == 200


@pytest.mark.parametrize(
    "name",
    [
        "C:/x",
        "C:x",
        "x:y",
        "a.txt::$DATA",
        "CON",
        "con.txt",
        "aux .txt",
        "LPT1.tar.gz",
        "com¹",
        "a.",
        "b /c",
        "x. ",
        "a\nb",
    ],
)
def test_names_that_another_system_reads_otherwise_are_never_written(place, name):
    data, _ = place
    requests = [
        ("POST", f"/userdata/{quoted(name)}", b"new"),
        ("POST", f"/userdata/a.txt/move/{quoted(name)}"),
        ("POST", "/upload/image", form([("image", name, "new")]), f"multipart/form-data; boundary={PART}"),
        (
            "POST",
            "/upload/image",
            form([("image", "f.png", "new"), ("subfolder", None, name)]),
            f"multipart/form-data; boundary={PART}",
        ),
    ]
    before = sorted(os.listdir(data / "input")), sorted(os.listdir(data / "user" / "default"))
    assert [status for _, status in run(attack(place, requests))] == [403, 403, 400, 400]
    assert (sorted(os.listdir(data / "input")), sorted(os.listdir(data / "user" / "default"))) == before


@pytest.mark.parametrize("name", ["C:/x", "a.txt:stream", "NUL", "sub/con.png", "a.txt."])
def test_on_windows_they_are_not_read_either(place, monkeypatch, name):
    monkeypatch.setattr(files, "_ON_WINDOWS", True)
    requests = [("GET", f"/view?filename={quoted(name)}&type=input"), ("GET", f"/userdata/{quoted(name)}")]
    assert [status for _, status in run(attack(place, requests))] == [400, 403]


def test_names_that_only_look_dangerous_are_names(place):
    """What is quoted twice is a name with a percent sign in it, and so are dots among other characters."""
    data, _ = place
    for name in ("..%2f..%2fq.txt", "a..b.txt", "...", "con-cat.txt", "%00.txt", "grün ☂.txt"):
        requests = [("POST", f"/userdata/{quoted(name)}", b"kept"), ("GET", f"/userdata/{quoted(name)}")]
        allowed = [200, 200] if name != "..." else [403, 404]
        assert [status for _, status in run(attack(place, requests))] == allowed, name
        assert (data / "user" / "default" / name).is_file() is (name != "...")
