"""`/users`, `/settings` and `/userdata` of the server."""

import asyncio
import json
import logging
import os

import pytest
from server_kit import answer, run, serving

from stable_cascade_nodes.host.server import context


def user(data_dir):
    return data_dir / "user" / "default"


async def call(client, method, path, body=None):
    async with client.request(method, path, data=body) as response:
        return response.status, await response.text()


def calls(data_dir, *requests):
    """Statuses and texts of requests `(method, path[, body])`, one after the other on one server."""

    async def scenario():
        async with serving({}, data_dir) as client:
            return [await call(client, *request) for request in requests]

    return run(scenario())


def test_the_editor_is_asked_to_bring_its_settings_only_once(tmp_path):
    answers = calls(tmp_path, ("GET", "/users"), ("POST", "/settings/a", "1"), ("GET", "/users"))
    assert json.loads(answers[0][1]) == {"storage": "server", "migrated": False}
    assert json.loads(answers[2][1]) == {"storage": "server", "migrated": True}


def test_nothing_is_written_by_looking(tmp_path):
    paths = ("/users", "/settings", "/settings/a", "/userdata?dir=workflows", "/v2/userdata", "/userdata/a.json")
    calls(tmp_path, *(("GET", path) for path in paths))
    assert not (tmp_path / "user").exists()


def test_settings_are_kept_over_a_restart(tmp_path):
    value = {"deep": [1, None, "é"]}
    calls(
        tmp_path,
        ("POST", "/settings", '{"a.b": 1, "c": true}'),
        ("POST", "/settings/a.b", '"changed"'),
        ("POST", "/api/settings/d%2Fe", json.dumps(value)),
    )
    [(_, everything), (_, one), (_, unknown)] = calls(
        tmp_path, ("GET", "/settings"), ("GET", "/settings/d%2Fe"), ("GET", "/settings/zzz")
    )
    assert json.loads(everything) == {"a.b": "changed", "c": True, "d/e": value}
    assert (json.loads(one), unknown) == (value, "null")


@pytest.mark.parametrize("path", ["/settings", "/settings/a"])
@pytest.mark.parametrize("body", ["", "nonsense", '{"a":', "[" * 100_000, b"\xff\xfe"])
def test_settings_that_are_not_json_are_refused_and_change_nothing(tmp_path, path, body):
    answers = calls(tmp_path, ("POST", "/settings/kept", "1"), ("POST", path, body), ("GET", "/settings"))
    assert [status for status, _ in answers] == [200, 400, 200]
    assert json.loads(answers[2][1]) == {"kept": 1}


def test_settings_in_a_list_are_refused(tmp_path):
    assert calls(tmp_path, ("POST", "/settings", "[1]"))[0][0] == 400


def test_numbers_that_json_does_not_have_do_not_break_the_settings(tmp_path):
    answers = calls(tmp_path, ("POST", "/settings/a", "NaN"), ("POST", "/settings/b", "2"), ("GET", "/settings"))
    assert json.loads(answers[2][1], parse_constant=pytest.fail) == {"a": None, "b": 2}


def test_settings_stored_at_once_are_all_kept(tmp_path):
    async def scenario():
        async with serving({}, tmp_path) as client:
            one = (answer(client, "POST", f"/settings/one.{n}", data=str(n)) for n in range(50))
            many = (answer(client, "POST", "/settings", json={f"many.{n}": n, f"more.{n}": n}) for n in range(25))
            answers = await asyncio.gather(*one, *many)
            assert {status for status, _ in answers} == {200}
            return (await answer(client, "GET", "/settings"))[1]

    expected = {f"one.{n}": n for n in range(50)} | {f"{name}.{n}": n for n in range(25) for name in ("many", "more")}
    assert run(scenario()) == expected
    assert json.loads((user(tmp_path) / "comfy.settings.json").read_text()) == expected
    assert os.listdir(user(tmp_path)) == ["comfy.settings.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe\x00", b"[" * 100_000], ids=range(5))
def test_a_broken_settings_file_is_set_aside(tmp_path, caplog, content):
    user(tmp_path).mkdir(parents=True)
    path = user(tmp_path) / "comfy.settings.json"
    path.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        answers = calls(tmp_path, ("GET", "/settings"), ("POST", "/settings/a", "1"), ("GET", "/settings"))
    assert [json.loads(text) for _, text in answers[::2]] == [{}, {"a": 1}]
    assert (user(tmp_path) / "comfy.settings.broken-1.json").read_bytes() == content
    assert "comfy.settings.broken-1.json" in caplog.text
    # The next broken one does not replace the first.
    path.write_bytes(b"broken again")
    assert calls(tmp_path, ("GET", "/settings"))[0] == (200, "{}")
    assert (user(tmp_path) / "comfy.settings.broken-1.json").read_bytes() == content
    assert (user(tmp_path) / "comfy.settings.broken-2.json").read_bytes() == b"broken again"


def test_settings_that_cannot_be_read_do_not_stop_the_editor(tmp_path, caplog):
    (user(tmp_path) / "comfy.settings.json").mkdir(parents=True)
    with caplog.at_level(logging.ERROR):
        answers = calls(tmp_path, ("GET", "/settings"), ("POST", "/settings/a", "1"), ("GET", "/users"))
    assert [status for status, _ in answers] == [200, 400, 200]
    assert "the settings cannot be read" in caplog.text


def test_a_file_is_stored_read_and_deleted(tmp_path):
    path = "/userdata/workflows%2Fsub%2Fmine.json"
    answers = calls(
        tmp_path,
        ("POST", path, "one"),
        ("GET", path),
        ("POST", path + "?overwrite=false", "two"),
        ("GET", "/api" + path),
        ("POST", path + "?overwrite=true&full_info=true", "three"),
        ("GET", path),
        ("DELETE", path),
        ("GET", path),
        ("DELETE", path),
    )
    assert [status for status, _ in answers] == [200, 200, 409, 200, 200, 200, 204, 404, 404]
    assert json.loads(answers[0][1]) == "workflows/sub/mine.json"
    assert [answers[index][1] for index in (1, 3, 5)] == ["one", "one", "three"]
    info = json.loads(answers[4][1])
    assert (info["path"], info["size"], sorted(info)) == (
        "workflows/sub/mine.json",
        5,
        ["created", "modified", "path", "size"],
    )


def test_of_files_stored_at_once_that_must_not_replace_one_wins(tmp_path):
    async def scenario():
        async with serving({}, tmp_path) as client:
            posts = (call(client, "POST", "/userdata/a.json?overwrite=false", str(n)) for n in range(20))
            statuses = [status for status, _ in await asyncio.gather(*posts)]
            return statuses, (await call(client, "GET", "/userdata/a.json"))[1]

    statuses, text = run(scenario())
    assert sorted(statuses) == [200] + [409] * 19
    assert statuses[int(text)] == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("POST", "/userdata/folder", "x"), 400),
        (("POST", "/userdata/folder%2F", "x"), 400),
        (("POST", "/userdata/a.json%2Fb.json", "x"), 400),
        (("POST", "/userdata/" + "n" * 300, "x"), 400),
        (("GET", "/userdata/folder"), 404),
        (("DELETE", "/userdata/folder"), 404),
        (("GET", "/userdata/a.json%2Fb.json"), 404),
        (("GET", "/userdata?dir=a.json"), 404),
        (("GET", "/userdata?dir=none"), 404),
        (("GET", "/userdata?dir="), 400),
        (("GET", "/userdata?dir=.."), 403),
        (("GET", "/v2/userdata?path=none"), 404),
        (("GET", "/v2/userdata?path=a.json"), 400),
        (("GET", "/v2/userdata?path=.."), 400),
        (("POST", "/userdata/none.json/move/b.json"), 404),
        (("POST", "/userdata/folder/move/b"), 404),
        (("POST", "/userdata/a.json/move/folder"), 400),
        (("POST", "/userdata/a.json/move/a.json%2Fb"), 400),
        (("POST", "/userdata/a.json/move/..%2Fb.json"), 403),
    ],
)
def test_userdata_refuses(tmp_path, request_, status):
    (user(tmp_path) / "folder").mkdir(parents=True)
    (user(tmp_path) / "a.json").write_text("kept")
    assert calls(tmp_path, request_)[0][0] == status
    assert sorted(os.listdir(user(tmp_path))) == ["a.json", "folder"]
    assert (user(tmp_path) / "a.json").read_text() == "kept"


def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "MAX_UPLOAD_SIZE", 1000)

    async def pieces():
        for _ in range(11):
            yield b"x" * 100

    async def scenario():
        async with serving({}, tmp_path) as client:
            announced = await call(client, "POST", "/userdata/a", b"x" * 1001)
            grown = await call(client, "POST", "/userdata/a", pieces())
            fits = await call(client, "POST", "/userdata/b", b"x" * 1000)
            return [status for status, _ in (announced, grown, fits)]

    assert run(scenario()) == [413, 413, 200]
    assert os.listdir(user(tmp_path)) == ["b"]
    assert os.listdir(tmp_path / "temp") == []


def test_moving(tmp_path):
    answers = calls(
        tmp_path,
        ("POST", "/userdata/a.json", "one"),
        ("POST", "/userdata/b.json", "two"),
        ("POST", "/userdata/a.json/move/b.json?overwrite=false"),
        ("POST", "/userdata/a.json/move/new%2Ffolder%2Fc.json?overwrite=false&full_info=true"),
        ("GET", "/userdata/a.json"),
        ("GET", "/userdata/new%2Ffolder%2Fc.json"),
        ("POST", "/userdata/new%2Ffolder%2Fc.json/move/b.json"),
        ("GET", "/userdata/b.json"),
    )
    assert [status for status, _ in answers] == [200, 200, 409, 200, 404, 200, 200, 200]
    assert json.loads(answers[3][1])["path"] == "new/folder/c.json"
    assert json.loads(answers[6][1]) == "b.json"
    assert [answers[index][1] for index in (5, 7)] == ["one", "one"]


def test_listings(tmp_path):
    for name in ("b.txt", "a.json", "c/d.json", ".index.json", ".hidden/x"):
        path = user(tmp_path) / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("12")
    queries = ("", "&recurse=true", "&recurse=true&split=true", "&split=true", "&full_info=true&split=true")
    answers = calls(tmp_path, *(("GET", f"/userdata?dir=top{query}") for query in queries), ("GET", "/v2/userdata"))
    flat, deep, split_deep, split, full, tree = (json.loads(text) for _, text in answers)
    assert flat == ["a.json", "b.txt"]
    assert deep == ["a.json", "b.txt", "c/d.json"]
    assert split_deep == [["a.json", "a.json"], ["b.txt", "b.txt"], ["c/d.json", "c", "d.json"]]
    assert split == [["a.json", "a.json"], ["b.txt", "b.txt"]]
    assert [(entry["path"], entry["size"]) for entry in full] == [("a.json", 2), ("b.txt", 2)]
    assert [(entry["type"], entry["path"]) for entry in tree] == [
        ("directory", "top/.hidden"),
        ("directory", "top/c"),
        ("directory", "top"),
        ("file", "top/.index.json"),
        ("file", "top/a.json"),
        ("file", "top/b.txt"),
        ("file", "top/c/d.json"),
        ("file", "top/.hidden/x"),
    ]
    assert all(entry["size"] == 2 and entry["modified"] > 0 for entry in tree if entry["type"] == "file")


def test_the_style_sheet_of_the_user_is_one_and_scripts_are_downloads(tmp_path):
    async def scenario():
        kinds = {}
        async with serving({}, tmp_path) as client:
            for name in ("user.css", "a.html", "a.js", "a.svg", "a.json"):
                await call(client, "POST", f"/userdata/{name}", "x")
                async with client.get(f"/userdata/{name}") as response:
                    kinds[name] = (response.content_type, response.headers["Content-Disposition"].split(";")[0])
        return kinds

    download = ("application/octet-stream", "attachment")
    assert run(scenario()) == {
        "user.css": ("text/css", "inline"),
        "a.html": download,
        "a.js": download,
        "a.svg": download,
        "a.json": ("application/json", "inline"),
    }
