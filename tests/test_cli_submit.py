"""The command `cascade submit`, against a ComfyUI that follows a script and against the embedded server."""

import json
import os
import signal
import sys

import pytest
from client_kit import FakeComfy, Serving, saved
from comfyui_answers import PROMPT_ANSWERS
from PIL import Image, PngImagePlugin

from stable_cascade_nodes.host import cli, create_app

GRAPH = {
    "1": {
        "class_type": "Paint",
        "inputs": {
            "seed": 3,
            "scale": 1.0,
            "invert": False,
            "text": "hello",
            "mode": "plain",
            "own": 4,
            "link": ["0", 0],
        },
        "_meta": {"title": "My paint. v1"},
    },
    "9": {"class_type": "Save", "inputs": {"image": ["1", 0]}},
}
# As newer servers describe combos: the type by name, the choices in the options.
PAINT = {
    "required": {
        "seed": ["INT", {"default": 0}],
        "scale": ["FLOAT", {}],
        "invert": ["BOOLEAN", {}],
        "text": ["STRING"],
        "mode": ["COMBO", {"options": ["plain", 3]}],
    },
    "optional": {"own": ["MY_SLIDER", {}], "link": ["IMAGE"]},
    "hidden": {"uid": "UNIQUE_ID"},
}


@pytest.fixture
def comfy():
    fake = FakeComfy()
    fake.info = {"Paint": {"input": PAINT}}
    fake.files["output", "", "a.png"] = b"pixels"
    with Serving(fake.app) as serving:
        fake.serving, fake.url = serving, serving.url
        yield fake


@pytest.fixture
def shell(comfy, tmp_path, monkeypatch, capsys):
    """`cascade submit` in an empty folder with `graph.json`; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))

    def run(*arguments, server=comfy.url):
        try:
            code = cli.main(["submit", "--server", server, *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def test_outputs_are_saved_and_named(shell, comfy, tmp_path):
    comfy.files["output", "cats", "b.png"] = b"more"

    async def script(run):
        run.begin()
        images = [saved("t.png", type="temp"), saved("a.png"), saved("b.png", "cats")]
        await run.end({"9": {"images": images}})

    comfy.script = script
    code, out, err = shell("graph.json", "--out", "here")
    assert code == 0, err
    assert out == "here/a.png\nhere/cats/b.png\n"
    assert (tmp_path / "here/a.png").read_bytes() == b"pixels"
    assert (tmp_path / "here/cats/b.png").read_bytes() == b"more"
    assert comfy.bodies[0]["prompt"] == GRAPH
    assert ("GET", "/object_info/Paint") not in comfy.asked
    assert shell("graph.json")[1] == "output/a.png\noutput/cats/b.png\n"


def test_temporary_pictures_are_saved_where_there_are_no_others(shell, comfy):
    comfy.files["temp", "", "t.png"] = b"pixels"

    async def script(run):
        run.begin()
        await run.end({"9": {"images": [saved("t.png", type="temp")]}})

    comfy.script = script
    assert shell("graph.json")[:2] == (0, "output/t.png\n")


def test_progress_is_shown_as_run_shows_it(shell, comfy):
    async def script(run):
        run.begin()
        await run.send("execution_start")
        await run.send("execution_cached", nodes=["1"])
        await run.send("executing", node="9")
        await run.send("progress", node="9", value=1, max=2)
        await run.send("executed", node="9", output={"text": ["twice \x1b[31mas red"], "images": []})
        await run.send("progress_state", nodes={"1": {"state": "finished"}, "9": {"state": "finished"}})
        blocked = {"exception_type": "ExecutionBlocked", "exception_message": "not today"}
        await run.send("execution_error", node_id="1", **blocked)
        await run.end()

    comfy.script = script
    code, out, err = shell("graph.json")
    assert (code, out) == (0, "")
    lines = err.splitlines()
    assert lines[0] == "Save: twice ?[31mas red"
    assert lines[1].startswith("1/1 Save  ")
    assert lines[2] == "1: not today"
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("1.seed=7", "seed", 7),
        ("Paint.scale=2", "scale", 2.0),
        ("My paint. v1.invert=on", "invert", True),
        ("1.text=12", "text", "12"),
        ("1.mode=3", "mode", 3),
        ("1.mode=unlisted", "mode", "unlisted"),
        ("1.own=5", "own", 5),
    ],
)
def test_settings_are_read_as_the_server_declares_them(shell, comfy, setting, name, value):
    code, _, err = shell("graph.json", "--set", setting)
    assert code == 0, err
    got = comfy.bodies[0]["prompt"]["1"]["inputs"][name]
    assert (type(got), got) == (type(value), value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=7", "expected NODE.INPUT=VALUE"),
        ("1.seed=seven", "'seven' is not a whole number"),
        ("1.own=wide", "'wide' is not a whole number"),
        ("1.sed=7", "Paint has no input 'sed'; its inputs are: seed, scale, invert, text, mode, own, link"),
        ("1.link=x", "takes a link"),
        ("5.seed=7", "no node has the id, class or title '5'"),
        ("9.image=x", "there is no node Save where this graph shall run"),
    ],
)
def test_settings_that_fit_nothing_are_explained(shell, comfy, setting, words):
    code, out, err = shell("graph.json", "--set", setting)
    assert (code, out) == (2, "")
    assert words in err
    assert comfy.bodies == []


def test_pictures_and_workflows_are_read_as_by_run(shell, comfy, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    info.add_text("workflow", json.dumps({"nodes": [1]}))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert shell("a.png")[0] == 0
    assert comfy.bodies[0]["prompt"] == GRAPH
    assert comfy.bodies[0]["extra_data"] == {"extra_pnginfo": {"workflow": {"nodes": [1]}}}

    (tmp_path / "ui.json").write_text(json.dumps({"nodes": [2], "links": []}))
    assert shell("graph.json", "--workflow", "ui.json")[0] == 0
    assert comfy.bodies[1]["extra_data"]["extra_pnginfo"]["workflow"] == {"nodes": [2], "links": []}

    code, _, err = shell("ui.json")
    assert code == 2
    assert "Export (API)" in err
    assert shell("gone.json")[0] == 2
    assert len(comfy.bodies) == 2


def test_a_refused_graph(shell, comfy):
    answer = PROMPT_ANSWERS["too_small"]
    comfy.answer = (400, answer["body"])
    code, out, err = shell("graph.json")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"cascade: graph.json cannot run on {comfy.url}.",
        "  node #1 (P_Src): Value -1 smaller than min of 0: i",
    ]


def test_one_broken_output_cancels_the_job(shell, comfy):
    errors = PROMPT_ANSWERS["one_good_one_bad"]["body"]["node_errors"]
    comfy.answer = (200, {"prompt_id": "p", "number": 0, "node_errors": errors})
    comfy.pending.append("p")
    code, out, err = shell("graph.json")
    assert (code, out) == (2, "")
    assert "node #3 (P_Src): Value 99 bigger than max of 10: i" in err
    assert comfy.pending == []
    assert comfy.interrupts == [{"prompt_id": "p"}]


def test_a_failing_node_is_named(shell, comfy):
    async def script(run):
        run.begin()
        await run.fail(exception_message="the paint is dry\n", exception_type="ValueError", traceback=["in go\n"])

    comfy.script = script
    code, out, err = shell("graph.json")
    assert (code, out) == (1, "")
    assert err == "cascade: node #1 (My paint. v1) failed: the paint is dry\n"
    assert "in go\n" in shell("graph.json", "--traceback")[2]


def test_a_job_that_somebody_stops(shell, comfy):
    async def script(run):
        run.begin()
        await run.fail("execution_interrupted", node_id="9")

    comfy.script = script
    assert shell("graph.json") == (130, "", "cascade: interrupted in node #9 (Save)\n")


@pytest.mark.parametrize("running", [True, False])
def test_ctrl_c_cancels_the_job_on_the_server(shell, comfy, running):
    async def script(run):
        if running:
            run.begin()
            await run.send("executing", node="1")
        os.kill(os.getpid(), signal.SIGINT)
        if running:
            await comfy.interrupted.wait()
            await run.fail("execution_interrupted", node_id="1")

    comfy.script = script
    before = signal.getsignal(signal.SIGINT)
    code, out, err = shell("graph.json")
    assert (code, out) == (130, "")
    assert err == ("cascade: interrupted in node #1 (My paint. v1)\n" if running else "cascade: interrupted\n")
    assert comfy.interrupts == [{"prompt_id": comfy.bodies[0]["prompt_id"]}]
    assert comfy.pending == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_program(shell, comfy):
    async def script(run):
        run.begin()
        os.kill(os.getpid(), signal.SIGINT)
        await comfy.interrupted.wait()
        os.kill(os.getpid(), signal.SIGINT)

    comfy.script = script
    code, out, err = shell("graph.json")
    assert (code, out, err) == (130, "", "cascade: interrupted; the job may go on\n")


def test_servers_that_are_not_there(shell, comfy):
    comfy.serving.stop()
    code, out, err = shell("graph.json")
    assert (code, out) == (1, "")
    assert err.startswith(f"cascade: {comfy.url} cannot be reached (")
    assert err.count("\n") == 1
    comfy.serving.start_again()
    code, _, err = shell("graph.json", server="ftp://x")
    assert code == 2
    assert "is not the address of a server" in err


def test_a_file_that_the_server_does_not_give(shell, comfy, tmp_path):
    comfy.files.clear()
    code, out, err = shell("graph.json")
    assert (code, out) == (1, "")
    assert "does not give the file 'a.png [output]'" in err
    comfy.files["output", "", "a.png"] = b"pixels"
    (tmp_path / "taken").write_text("")
    code, out, err = shell("graph.json", "--out", "taken")
    assert (code, out) == (1, "")
    assert "taken" in err


def test_without_aiohttp_the_command_says_what_to_install(shell, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    code, _, err = shell("graph.json")
    assert code == 2
    assert "pip install aiohttp" in err


class Paint:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def go(self, seed):
        import torch

        return (torch.full((1, 2, 3, 3), seed / 255),)


def test_the_embedded_server_makes_the_picture(shell, tmp_path):
    graph = {
        "1": {"class_type": "Paint", "inputs": {"seed": 3}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "p/x"}},
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    with Serving(lambda: create_app({"Paint": Paint}, tmp_path / "data")) as serving:
        code, out, err = shell("graph.json", "--set", "Paint.seed=9", "--out", "here", server=serving.url)
        assert (code, out) == (0, "here/p/x_00001_.png\n"), err
        assert [line.split("  ")[0] for line in err.splitlines()] == ["1/2 Paint", "2/2 SaveImage"]
        with Image.open(out.strip()) as picture:
            assert picture.getpixel((0, 0)) == (9, 9, 9)
            assert json.loads(picture.info["prompt"])["1"]["inputs"]["seed"] == 9
        # The picture runs again where the server is asked for its graph; nothing is new but the name.
        code, out, err = shell(out.strip(), "--out", "here", server=serving.url)
        assert (code, out) == (0, "here/p/x_00001_.png\n"), err
        assert err == ""
        code, _, err = shell("graph.json", "--set", "Paint.seed=red", server=serving.url)
        assert (code, err) == (2, "cascade: --set Paint.seed=red: 'red' is not a whole number\n")
