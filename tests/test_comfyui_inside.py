"""The pack inside a real ComfyUI, in one process with it. The checks are in `comfyui_inside.py` and beside it."""

import json
import re
import subprocess
from pathlib import Path

import comfyui
import numpy as np
import pytest
from PIL import Image

from stable_cascade_nodes.host import cli

HERE = Path(__file__).parent
FILES = ("comfyui_inside.py", "comfyui_wires.py", "comfyui_bridge.py", "comfyui_explore.py", "comfyui_quantized.py")
NAMES = [name for file in FILES for name in re.findall(r"^@check\ndef (\w+)", (HERE / file).read_text(), re.MULTILINE)]
GRAPHS = {name: comfyui.short(graph) for name, graph in comfyui.graphs().items()}

pytestmark = comfyui.needed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return comfyui.install(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def found(base):
    """What each check came to."""
    (base / "graphs.json").write_text(json.dumps(GRAPHS))
    answers = base / "answers.json"
    arguments = [HERE / FILES[0], comfyui.checkout(), base, comfyui.PACK, base / "graphs.json", answers]
    done = subprocess.run(
        [comfyui.python(), *map(str, arguments)],
        env=comfyui.environment(base),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert answers.exists(), done.stdout[-6000:]
    return json.loads(answers.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_check(found, name):
    assert found[name] is None, found[name]


def test_all_checks_ran(found):
    assert sorted(found) == sorted(NAMES) and len(NAMES) >= 20


@pytest.mark.parametrize("name", GRAPHS)
def test_the_picture_is_the_embedded_hosts(found, base, tmp_path, name):
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps(GRAPHS[name]))
    assert cli.main(["run", str(graph), "--data", str(tmp_path)]) == 0
    ours = sorted((tmp_path / "output").glob("*.png"))
    theirs = sorted((base / name).glob("*.png"))
    assert len(ours) == len(theirs) > 0
    for pair in zip(ours, theirs, strict=True):
        first, second = (np.asarray(Image.open(path)).astype(int) for path in pair)
        assert first.shape == second.shape and first.std() > 5
        assert abs(first - second).max() <= 1
