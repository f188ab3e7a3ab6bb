"""The command `cascade`."""

import io
import json
import os
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import stable_cascade_nodes
from stable_cascade_nodes.host import cli
from stable_cascade_nodes.host.console import ConsoleProgress
from stable_cascade_nodes.host.demo import demo_graph
from stable_cascade_nodes.nodes import runtime


class Paint:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 255}),
                "scale": ("FLOAT", {"default": 1.0}),
                "invert": ("BOOLEAN", {"default": False}),
                "text": ("STRING", {"default": ""}),
                "mode": (["plain", "fail", "stop"],),
            }
        }

    def go(self, seed, scale, invert, text, mode):
        import torch

        if mode == "fail":
            raise ValueError("the paint is dry")
        bar = runtime.progress(2)
        bar.update(1)
        if mode == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                bar.update(1)
            raise AssertionError("the interruption was not seen")
        value = seed * scale / 255
        return (torch.full((1, 2, 3, 3), 1 - value if invert else value),)


class Say:
    OUTPUT_NODE, RETURN_TYPES, FUNCTION, CATEGORY = True, (), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def go(self, image):
        return {"ui": {"text": ["painted"]}}


GRAPH = {
    "1": {
        "class_type": "Paint",
        "inputs": {"seed": 3, "scale": 1.0, "invert": False, "text": "hello", "mode": "plain"},
        "_meta": {"title": "My paint. v1"},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "p"}},
    "3": {"class_type": "Say", "inputs": {"image": ["1", 0]}},
}


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder, with two more nodes; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stable_cascade_nodes, "NODE_CLASS_MAPPINGS", {"Paint": Paint, "Say": Say}, raising=False)
    monkeypatch.setattr(stable_cascade_nodes, "NODE_DISPLAY_NAME_MAPPINGS", {"Paint": "Paint it"}, raising=False)
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def pixel(path):
    with Image.open(path) as picture:
        return picture.getpixel((0, 0))[0]


def carried(path):
    with Image.open(path) as picture:
        return {name: json.loads(text) for name, text in picture.info.items() if name in ("prompt", "workflow")}


def test_run_saves_a_picture_that_carries_its_graph(shell, tmp_path):
    code, out, err = shell("run", "graph.json")
    assert code == 0
    assert out == f"{tmp_path / 'output' / 'p_00001_.png'}\n"
    assert "My paint. v1" in err
    assert "Say: painted" in err
    assert carried(out.strip()) == {"prompt": GRAPH}


def test_run_again_from_the_picture(shell, tmp_path):
    shell("run", "graph.json")
    code, out, _ = shell("run", tmp_path / "output" / "p_00001_.png", "--set", "1.seed=9")
    assert code == 0
    assert pixel(out.strip()) == 9
    assert carried(out.strip())["prompt"]["1"]["inputs"]["seed"] == 9


def test_folders_can_be_chosen_and_a_workflow_kept(shell, tmp_path):
    (tmp_path / "ui.json").write_text(json.dumps({"nodes": [], "links": []}))
    code, out, _ = shell("run", "graph.json", "--data", "d", "--output", "o", "--workflow", "ui.json")
    assert code == 0
    assert out.strip() == str(tmp_path / "o" / "p_00001_.png")
    assert carried(out.strip()) == {"prompt": GRAPH, "workflow": {"nodes": [], "links": []}}
    code, out, _ = shell("run", out.strip())
    assert carried(out.strip())["workflow"] == {"nodes": [], "links": []}


def test_a_request_body_is_a_graph_file_too(shell, tmp_path):
    body = {"prompt": GRAPH, "extra_data": {"extra_pnginfo": {"workflow": {"nodes": [1]}}}}
    (tmp_path / "body.json").write_text(json.dumps(body))
    code, out, _ = shell("run", "body.json")
    assert code == 0
    assert carried(out.strip())["workflow"] == {"nodes": [1]}


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("1.seed=7", "seed", 7),
        ("Paint.scale=0.5", "scale", 0.5),
        ("My paint. v1.invert=yes", "invert", True),
        ("1.invert=FALSE", "invert", False),
        ("1.text=a=b.c", "text", "a=b.c"),
        ("1.text=", "text", ""),
        ("1.text=12", "text", "12"),
    ],
)
def test_settings_are_read_as_the_declared_type(shell, setting, name, value):
    code, out, err = shell("run", "graph.json", "--set", setting)
    assert code == 0, err
    got = carried(out.strip())["prompt"]["1"]["inputs"][name]
    assert (type(got), got) == (type(value), value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=7", "expected NODE.INPUT=VALUE"),
        ("1.seed", "expected NODE.INPUT=VALUE"),
        ("1.seed=seven", "'seven' is not a whole number"),
        ("1.scale=wide", "'wide' is not a number"),
        ("1.invert=maybe", "neither true nor false"),
        ("1.sed=7", "no input 'sed'; its inputs are: seed, scale"),
        ("5.seed=7", "no node has the id, class or title '5'"),
        ("2.images=x", "takes a link"),
        ("1.mode=wild", "'wild' not in"),
        ("1.seed=256", "bigger than max of 255"),
    ],
)
def test_settings_that_fit_nothing_are_explained(shell, setting, words):
    code, out, err = shell("run", "graph.json", "--set", setting)
    assert code == 2
    assert out == ""
    assert words in err
    assert not os.path.exists("output")


def test_a_name_of_two_nodes_is_refused(shell, tmp_path):
    (tmp_path / "twins.json").write_text(json.dumps({**GRAPH, "4": GRAPH["1"]}))
    code, _, err = shell("run", "twins.json", "--set", "Paint.seed=1")
    assert code == 2
    assert "2 nodes are called 'Paint'; use one of the ids 1, 4" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "this is not JSON"),
        ("[1]", "expected a JSON object of nodes"),
        ('{"1": 2}', "'1' is not a node in API format"),
        ('{"last_node_id": 1, "nodes": [], "links": []}', "Export (API)"),
        ('{"1": {"class_type": "Nope", "inputs": {}}}', "node Nope does not exist"),
        ('{"1": {"class_type": "Paint", "inputs": {}}}', "Prompt has no outputs"),
        ('{"1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}}}', "node #2"),
    ],
)
def test_files_that_are_no_graph_are_explained(shell, tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    code, out, err = shell("run", "x.json")
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_missing_files_and_pictures_without_a_graph(shell, tmp_path):
    assert shell("run", "gone.json")[0] == 2
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    code, _, err = shell("run", "plain.png")
    assert code == 2
    assert "carries no prompt" in err


def test_one_broken_output_stops_the_command_before_it_runs(shell, tmp_path):
    (tmp_path / "half.json").write_text(json.dumps({**GRAPH, "4": {"class_type": "Say", "inputs": {}}}))
    code, _, err = shell("run", "half.json")
    assert code == 2
    assert "node #4 (Say): Required input is missing: image" in err
    assert not os.path.exists("output")


def test_a_failing_node_is_named(shell):
    code, out, err = shell("run", "graph.json", "--set", "1.mode=fail")
    assert (code, out) == (1, "")
    assert "node #1 (My paint. v1) failed: the paint is dry" in err
    assert "in go" not in err
    assert "in go" in shell("run", "graph.json", "--set", "1.mode=fail", "--traceback")[2]


def test_ctrl_c_stops_the_run_at_the_next_step(shell):
    before = signal.getsignal(signal.SIGINT)
    code, _, err = shell("run", "graph.json", "--set", "1.mode=stop")
    assert code == 130
    assert "interrupted in node #1" in err
    assert signal.getsignal(signal.SIGINT) is before


def test_usage_errors_and_version(shell):
    assert shell()[0] == 2
    assert shell("nonsense")[0] == 2
    code, out, _ = shell("--version")
    assert code == 0
    assert out.startswith("cascade 0.")


def test_help_is_quick_to_load():
    code = (
        "import sys\n"
        "from stable_cascade_nodes.host import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit: pass\n"
        "bad = [m for m in ('torch', 'transformers', 'aiohttp') if m in sys.modules]\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cascade run text_to_image.json --set" in done.stdout


def test_demo_saves_the_picture_with_its_graph(shell, tmp_path, monkeypatch):
    asked = []

    class CascadePipeline:
        @classmethod
        def load(cls, name):
            asked.append(name)
            return cls()

        def generate(self, prompt, seed=0, callback=None):
            asked.append((prompt, seed))
            for stage in ("stage_c", "stage_b"):
                for step in range(2):
                    callback(stage, SimpleNamespace(step=step, steps=2))
            return [Image.new("RGB", (2, 2), "red")]

    module = ModuleType("pipeline")
    module.CascadePipeline = CascadePipeline
    monkeypatch.setitem(sys.modules, "stable_cascade_nodes.cascade_ops.pipeline", module)
    template = {
        "1": {"class_type": "Encode", "inputs": {"text": "old"}},
        "2": {"class_type": "Encode", "inputs": {"text": "bad quality"}},
        "3": {"class_type": "Sample", "inputs": {"positive": ["1", 0], "negative": ["2", 0], "seed": 0}},
    }
    (tmp_path / "template.json").write_text(json.dumps(template))
    monkeypatch.setattr(cli, "DEMO_GRAPH", tmp_path / "template.json")
    code, out, err = shell("demo", "a green star", "--seed", 5, "--out", "star.png")
    assert (code, out) == (0, "star.png\n"), err
    assert asked == ["auto", ("a green star", 5)]
    assert [line.split("  ")[0] for line in err.splitlines()] == ["1/2 Sample Stage C", "2/2 Sample Stage B"]
    graph = carried(tmp_path / "star.png")["prompt"]
    assert graph["1"]["inputs"]["text"] == "a green star"
    assert graph["2"]["inputs"]["text"] == "bad quality"
    assert graph["3"]["inputs"]["seed"] == 5

    template["3"]["inputs"].pop("positive")
    (tmp_path / "template.json").write_text(json.dumps(template))
    with pytest.raises(ValueError, match="positive"):
        demo_graph(tmp_path / "template.json", "x", 1)
    assert shell("demo")[0] == 1


def test_inspect_describes_a_file(shell, monkeypatch):
    def inspect_file(path):
        if path.name == "bad.safetensors":
            raise ValueError("bad.safetensors: not a checkpoint")
        return SimpleNamespace(describe=lambda: "Stage C, 3.6B", as_dict=lambda: {"stage": "stage_c"})

    module = ModuleType("checkpoints")
    module.inspect_file = inspect_file
    monkeypatch.setitem(sys.modules, "stable_cascade_nodes.cascade_ops.checkpoints", module)
    assert shell("inspect", "c.safetensors")[:2] == (0, "Stage C, 3.6B\n")
    code, out, _ = shell("inspect", "c.safetensors", "--json")
    assert json.loads(out) == {"stage": "stage_c"}
    code, out, err = shell("inspect", "bad.safetensors")
    assert (code, out) == (1, "")
    assert err == "cascade: bad.safetensors: not a checkpoint\n"


def test_the_bar_is_drawn_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def messages(stream):
        console = ConsoleProgress({"1": "Sample", "2": "Save"}, stream)
        console.receive("executing", {"node": "1"})
        console.receive("progress", {"value": 5, "max": 20, "node": "1"})
        console.receive("progress_state", {"nodes": {"1": {"state": "finished"}}})
        console.receive("executing", {"node": "2"})
        return stream.getvalue()

    drawn = messages(Terminal())
    assert "1/2 Sample  [######..................] 5/20" in drawn
    assert "2/2 Save" in drawn
    plain = messages(io.StringIO())
    assert "\r" not in plain
    assert plain.count("\n") == 1
    assert plain.startswith("1/2 Sample  ")
