"""What the server shows of node packs and of the editor itself."""

import json
import logging

import pytest
from server_kit import run, serving

from stable_cascade_nodes.host.pack import pack_name
from stable_cascade_nodes.host.server.app import cascade_app, frontend_folder
from stable_cascade_nodes.host.server.context import Pack


def put(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.fixture
def pack(tmp_path):
    root = tmp_path / "pack"
    return Pack(
        "my-pack",
        web=put(root / "web", js__a_DOT_js="A", js__deep__b_DOT_js="B", docs__Node_DOT_md="# Node", x_DOT_txt="X"),
        templates=put(
            root / "workflows",
            one_DOT_json="{}",
            one_DOT_jpg="JPG",
            code_DOT_py="PY",
            api__one_DOT_json="{}",
            y_DOT_jpg="Y",
        ),
        locales=put(
            root / "locales", en__nodeDefs_DOT_json='{"N": {"display_name": "One"}}', en__main_DOT_json='{"k": "v"}'
        ),
    )


@pytest.fixture
def frontend(tmp_path):
    return put(
        tmp_path / "static",
        index_DOT_html="<html>",
        scripts__app_DOT_js="APP",
        assets__x_DOT_js="X",
        extensions__core__c_DOT_js="CORE",
    )


def get(data_dir, *paths, **options):
    """(status, content type, text) of each path."""

    async def scenario():
        given = []
        async with serving({}, data_dir, **options) as client:
            for path in paths:
                async with client.get(path) as response:
                    given.append((response.status, response.content_type, await response.text()))
        return given

    return run(scenario())


def test_scripts_are_listed_and_every_listed_one_is_there(tmp_path, pack):
    [(_, _, text)] = get(tmp_path, "/extensions", packs=[pack])
    scripts = json.loads(text)
    assert scripts == ["/extensions/my-pack/js/a.js", "/extensions/my-pack/js/deep/b.js"]
    given = get(tmp_path, *scripts, *(f"/api{path}" for path in scripts), packs=[pack])
    assert given == [(200, "text/javascript", name) for name in "ABAB"]


def test_a_listed_name_is_quoted(tmp_path):
    pack = Pack("a pack", web=put(tmp_path / "web"))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "ü #1.js").write_text("J")
    [(_, _, text)] = get(tmp_path, "/extensions", packs=[pack])
    assert get(tmp_path, *json.loads(text), packs=[pack]) == [(200, "text/javascript", "J")]


def test_help_pages_and_other_files_of_the_web_folder(tmp_path, pack):
    paths = ("docs/Node.md", "docs/Node/en.md", "x.txt", "none.js", "docs", "js/../../workflows/one.json")
    given = get(tmp_path, *(f"/extensions/my-pack/{path}" for path in paths), packs=[pack])
    assert [status for status, _, _ in given] == [200, 404, 200, 404, 404, 404]
    assert given[0] == (200, "text/markdown", "# Node")


def test_templates_are_the_workflows_and_their_pictures_only(tmp_path, pack):
    listed, *served = get(
        tmp_path,
        "/workflow_templates",
        *(
            f"/api/workflow_templates/my-pack/{name}"
            for name in ("one.json", "one.jpg", "code.py", "y.jpg", "none.json")
        ),
        "/api/workflow_templates/other/one.json",
        "/api/workflow_templates/my-pack/api%2Fone.json",
        packs=[pack],
    )
    assert json.loads(listed[2]) == {"my-pack": ["one"]}
    assert served == [
        (200, "application/json", "{}"),
        (200, "image/jpeg", "JPG"),
        *[(404, "application/octet-stream", "")] * 5,
    ]


def test_translations_of_several_packs_are_merged_and_the_later_one_holds(tmp_path, pack, caplog):
    second = Pack(
        "second",
        locales=put(
            tmp_path / "second",
            en__nodeDefs_DOT_json='{"N": {"display_name": "Two"}, "M": {}}',
            en__settings_DOT_json='{"S": 1}',
            de__commands_DOT_json='{"C": 2}',
            fr__main_DOT_json="broken",
            it__main_DOT_json="[1]",
        ),
    )
    with caplog.at_level(logging.WARNING):
        [(_, _, text)] = get(tmp_path, "/i18n", packs=[pack, second])
    assert json.loads(text) == {
        "en": {"k": "v", "nodeDefs": {"N": {"display_name": "Two"}, "M": {}}, "settings": {"S": 1}},
        "de": {"commands": {"C": 2}},
    }
    assert "fr" in caplog.text
    assert "it" in caplog.text


def test_a_pack_without_files(tmp_path):
    paths = ("/extensions", "/workflow_templates", "/i18n", "/global_subgraphs", "/extensions/bare/a.js")
    given = get(tmp_path, *paths, packs=[Pack("bare")])
    assert [text for _, _, text in given] == ["[]", "{}", "{}", "{}", ""]
    assert given[-1][0] == 404


def test_the_editor(tmp_path, frontend, pack):
    paths = ("/", "/index.html", "/scripts/app.js", "/extensions/core/c.js", "/api/extensions/core/c.js")
    given = get(tmp_path, *paths, frontend=frontend, packs=[pack])
    assert given == [
        (200, "text/html", "<html>"),
        (200, "text/html", "<html>"),
        (200, "text/javascript", "APP"),
        (200, "text/javascript", "CORE"),
        (200, "text/javascript", "CORE"),
    ]
    missing = ("/user.css", "/api/nothing", "/nothing", "/scripts", "/extensions/core", "/experiment/models")
    assert get(tmp_path, *missing, frontend=frontend) == [(404, "application/octet-stream", "")] * len(missing)


def test_the_editor_asks_for_lists_of_core_templates_and_gets_empty_ones(tmp_path, frontend):
    paths = ("/templates/index.json", "/templates/index.zh-TW.json", "/templates/index_logo.json")
    assert [text for _, _, text in get(tmp_path, *paths, frontend=frontend)] == ["[]", "[]", "{}"]


def test_a_new_version_of_the_editor_is_seen_at_once(tmp_path, frontend):
    async def scenario():
        async with serving({}, tmp_path, frontend=frontend) as client:
            kept = {}
            for path in ("/", "/scripts/app.js", "/assets/x.js"):
                async with client.get(path) as response:
                    kept[path] = response.headers["Cache-Control"]
            return kept

    given = run(scenario())
    assert given["/"] == given["/scripts/app.js"] == "no-cache"
    assert "immutable" in given["/assets/x.js"]


def test_without_the_editor_the_page_says_how_to_get_it(tmp_path):
    [(status, kind, text)] = get(tmp_path, "/")
    assert (status, kind) == (404, "text/plain")
    assert 'pip install "stable-cascade-nodes[host]"' in text


def test_this_package_in_the_real_editor(tmp_path):
    """What the editor asks for when it starts, of the installed frontend and this package."""
    from aiohttp import ClientSession
    from aiohttp.test_utils import TestServer

    async def scenario():
        async with (
            TestServer(cascade_app(tmp_path, frontend=frontend_folder())) as server,
            ClientSession(server.make_url("/")) as session,
        ):

            async def fetch(path):
                async with session.get(path) as response:
                    assert response.status == 200, path
                    return await response.text()

            assert "<html" in await fetch("/")
            for path in json.loads(await fetch("/api/extensions")):
                assert await fetch(path)
            name = pack_name()
            templates = json.loads(await fetch("/api/workflow_templates"))[name]
            assert "text_to_image" in templates
            for template in templates:
                assert json.loads(await fetch(f"/api/workflow_templates/{name}/{template}.json"))["nodes"]
            assert "CascadeSampleStageC" in json.loads(await fetch("/api/i18n"))["en"]["nodeDefs"]
            assert await fetch(f"/extensions/{name}/docs/CascadeSampleStageC.md")
            assert "window.comfyAPI" in await fetch("/scripts/app.js")

    run(scenario())
