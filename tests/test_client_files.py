"""The client: files that are fetched and saved, whatever the server calls them."""

from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from client_kit import (
    fake_comfy,
    follow,
    saved,
)
from hypothesis import given
from hypothesis import strategies as st

from stable_cascade_nodes.host.client import (
    Result,
    ServerFile,
    ServerUnreachable,
    UnexpectedAnswer,
)
from stable_cascade_nodes.host.client.results import Download, safe_path


@pytest.fixture
def comfy():
    with fake_comfy() as fake:
        yield fake


def download(comfy, folder, *files):
    for file in files:
        comfy.files.setdefault((file.type, file.subfolder, file.filename), b"pixels")

    async def work(client):
        return [await client.download(file, folder) for file in files]

    return follow(comfy.url, work)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_fetched_and_saved_in_their_subfolders(comfy, tmp_path):
    file = ServerFile("ä b+&.png", "cats/seven", "temp")
    assert download(comfy, tmp_path / "new", file) == [tmp_path / "new/cats/seven/ä b+&.png"]
    assert contents(tmp_path) == {"new/cats/seven/ä b+&.png": b"pixels"}
    assert follow(comfy.url, lambda client: client.fetch(file)) == b"pixels"
    with pytest.raises(UnexpectedAnswer, match=r"'gone.png \[output\]' \(status 404\)"):
        follow(comfy.url, lambda client: client.fetch(ServerFile("gone.png")))


HOSTILE = [
    ("../x.png", "", "x.png"),
    ("..", "", "file"),
    ("", "", "file"),
    ("/etc/passwd", "", "passwd"),
    ("x.png", "../../up", "up/x.png"),
    ("x.png", "/abs/./lute", "abs/lute/x.png"),
    ("..\\..\\x.png", "a\\..\\b", "a/b/x.png"),
    ("C:\\Windows\\x.png", "C:", "C_/x.png"),
    ("\\\\host\\share\\x.png", "", "x.png"),
    (".bashrc", ".ssh", "ssh/bashrc"),
    ("nul.png", "CON", "_CON/_nul.png"),
    ("a\0b\n\x1b[31m.png", "", "a_b__[31m.png"),
    ("x.png:stream", "", "x.png_stream"),
    ("trailing. . ", "dots...", "dots/trailing"),
    ('<script>|?*".png', "", "_script_____.png"),
    ("\u202egnp.exe", "", "_gnp.exe"),
    ("\ud800.png", "", "_.png"),
    ("ä" * 300 + ".png", "", "ä" * 98 + ".png"),
    ("x." + "y" * 300, "", "x." + "y" * 19),
]


@pytest.mark.parametrize(("filename", "subfolder", "saved_as"), HOSTILE)
def test_a_hostile_name_stays_in_the_folder(tmp_path, filename, subfolder, saved_as):
    target = safe_path(tmp_path / "a" / "out", ServerFile(filename, subfolder))
    with Download(target) as saving:
        saving.write(b"pixels")
        assert saving.keep() == target
    assert contents(tmp_path) == {f"a/out/{saved_as}": b"pixels"}


@given(st.text(), st.text())
def test_no_name_leads_out_of_the_folder(filename, subfolder):
    target = safe_path(Path("out"), ServerFile(filename, subfolder))
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(str(target))
        assert path.parts[0] == "out"
        assert len(path.parts) > 1
        assert ".." not in path.parts
        assert path.name
        assert not path.name.startswith(".")


def test_a_link_in_the_folder_does_not_lead_a_file_out(comfy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / "x.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    with pytest.raises(ValueError, match="leads out of"):
        download(comfy, tmp_path / "out", ServerFile("x.png", "link"))
    assert download(comfy, tmp_path / "out", ServerFile("x.png")) == [tmp_path / "out" / "x (1).png"]
    assert contents(tmp_path / "elsewhere") == {}


def test_a_file_that_is_there_stays(comfy, tmp_path):
    (tmp_path / "x.png").write_bytes(b"another")
    (tmp_path / "x (1).png").write_bytes(b"pixelz")
    first = download(comfy, tmp_path, ServerFile("x.png"))
    assert first == [tmp_path / "x (2).png"] == download(comfy, tmp_path, ServerFile("x.png"))
    assert contents(tmp_path) == {"x.png": b"another", "x (1).png": b"pixelz", "x (2).png": b"pixels"}


def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"another")
    with Download(tmp_path / "x.png") as saving:
        saving.write(b"pixels")
        monkeypatch.setattr("os.path.lexists", lambda path: False)
        assert saving.keep() == tmp_path / "x (1).png"
        monkeypatch.undo()
    assert contents(tmp_path) == {"x.png": b"another", "x (1).png": b"pixels"}


def test_half_a_file_leaves_nothing(comfy, tmp_path):
    comfy.files["output", "", "x.png"] = None
    comfy.files["output", "", "y.png"] = "cut"
    with pytest.raises(UnexpectedAnswer):
        download(comfy, tmp_path, ServerFile("x.png"))
    with pytest.raises(ServerUnreachable):
        download(comfy, tmp_path, ServerFile("y.png"))
    assert contents(tmp_path) == {}


def test_results_name_their_files():
    outputs = {
        "1": {"images": [saved("t.png", type="temp")], "text": ["hello"], "animated": [False]},
        "2": {"gifs": [{"filename": "v.mp4", "subfolder": "s", "format": "video/mp4"}], "images": [{"name": "?"}, 3]},
        "3": None,
    }
    result = Result("id", outputs)
    temporary, video = ServerFile("t.png", "", "temp", "1"), ServerFile("v.mp4", "s", "output", "2", "gifs")
    assert result.files == [temporary, video]
    assert result.images == [temporary]
    assert result.kept == [video]
    assert Result("id", {"1": outputs["1"]}).kept == [temporary]
