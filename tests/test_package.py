"""What is installed, and what importing it does."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA_FOLDERS = ("cascade_ops/data", "tiny/weights", "workflows", "web", "locales")
# The folders of a clone that are not the package, and what people have lying in one.
NOT_PACKAGED = {"tests", "docs", "build", "dist", "output", "input", "temp", "models", "data"}


def _ignore(directory, names):
    top = Path(directory) == ROOT
    return [
        name
        for name in names
        if name.startswith(".")
        or name in ("__pycache__", "node_modules")
        or name.endswith(".egg-info")
        or (top and name in NOT_PACKAGED)
        or Path(directory, name, "pyvenv.cfg").exists()
    ]


def _files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the package's own files, in a folder of an awkward name. Not to be changed by a test."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "some-odd.name", ignore=_ignore))


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    """The wheel, built from a copy without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(source, folder / "source")
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, copy]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def wheel_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(source, wheel_names):
    modules = {f"stable_cascade_nodes/{name}" for name in _files(source) if name.endswith(".py")}
    assert "stable_cascade_nodes/cascade_ops/models/stage_c.py" in modules
    assert modules == {name for name in wheel_names if name.endswith(".py")}


def test_every_folder_with_modules_is_a_package(source):
    folders = {path.parent for path in source.rglob("*.py")}
    assert sorted(folder for folder in folders if not (folder / "__init__.py").exists()) == []


@pytest.mark.parametrize("folder", DATA_FOLDERS)
def test_the_wheel_holds_every_data_file(source, wheel_names, folder):
    kept = {f"stable_cascade_nodes/{name}" for name in _files(source) if name.startswith(f"{folder}/")}
    assert kept
    assert kept == {name for name in wheel_names if name.startswith(f"stable_cascade_nodes/{folder}/")}


def test_the_wheel_holds_what_a_fresh_machine_needs(wheel_names):
    import stable_cascade_nodes

    stages = ("text_encoder", "stage_c", "stage_b", "stage_a", "latent_encoder", "previewer")
    needed = [
        "cascade_ops/data/clip_merges.txt.gz",
        "locales/en/nodeDefs.json",
        "workflows/api/text_to_image.json",
        *(f"tiny/weights/{stage}.safetensors" for stage in stages),
        *(f"web/docs/{node}.md" for node in stable_cascade_nodes.NODE_CLASS_MAPPINGS),
    ]
    assert [name for name in needed if f"stable_cascade_nodes/{name}" not in wheel_names] == []


def test_the_wheel_says_its_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        parts = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(parts["METADATA"]).decode()
        commands = archive.read(parts["entry_points.txt"]).decode()
        # Nothing beside the package: a top-level folder `tests` or `docs` would clash with other packages' own.
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert "License-Expression: MIT\n" in metadata
    assert {"LICENSE", "CLIP_LICENSE.txt"} <= parts.keys()
    assert {line for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        "Provides-Extra: host",
        "Provides-Extra: train",
        "Provides-Extra: faces",
        "Provides-Extra: benchmark",
        "Provides-Extra: test",
    }
    assert "cascade = stable_cascade_nodes.host.cli:main" in commands
    assert tops == {"stable_cascade_nodes", Path(parts["METADATA"]).parts[0]}


def test_a_plain_install_makes_a_picture_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    code = "import stable_cascade_nodes as package; print(package.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("CASCADE_MODELS", None)

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)

    assert Path(run("-c", code).stdout.strip()) == site / "stable_cascade_nodes" / "__init__.py"
    before = _files(site)
    done = run("-m", "stable_cascade_nodes.host.cli", "demo", "a red circle on a blue background", "--out", "a.png")
    assert done.returncode == 0, done.stderr
    assert _files(elsewhere) == ["a.png"]
    assert _files(site) == before


# As ComfyUI loads a folder of custom_nodes: a module named after its path, dots written as _x_.
LOAD_AS_COMFYUI = """
import importlib.util, json, logging, os, sys, warnings
import numpy, PIL.Image, safetensors.torch, torch

folder = sys.argv[1]
seen = []

def watch(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
    if event == "open" and (set(str(arguments[1] or "")) & set("wax+") or arguments[2] & writes):
        seen.append(f"wrote {arguments[0]}")
    if event.startswith(("socket.", "subprocess.", "urllib.", "os.system", "os.mkdir", "os.rename", "os.remove")):
        seen.append(event)

class Records(logging.Handler):
    def emit(self, record):
        seen.append(f"logged {record.getMessage()}")

logging.basicConfig(level=1, handlers=[Records()])
warnings.simplefilter("error")
before = set(sys.modules)
sys.addaudithook(watch)

name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)

imported = set(sys.modules) - before
found = {
    "seen": list(seen),
    "nodes": sorted(module.NODE_CLASS_MAPPINGS),
    "titled": sorted(module.NODE_DISPLAY_NAME_MAPPINGS),
    "web": os.path.isdir(os.path.join(folder, module.WEB_DIRECTORY)),
    "own": sorted(key[len(name) + 1 :] for key in imported if key.startswith(name + ".")),
    "others": sorted({key.split(".")[0] for key in imported if not key.startswith(name)}),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded_by_comfyui(source, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    folder = shutil.copytree(source, base / "custom_nodes" / "some-odd.name")
    working = base / "working"
    working.mkdir()
    before = _files(base)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", LOAD_AS_COMFYUI, str(folder)]
    done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert _files(base) == before
    return json.loads(done.stdout)


def test_a_folder_of_any_name_loads_as_comfyui_loads_it(loaded_by_comfyui):
    assert len(loaded_by_comfyui["nodes"]) >= 12
    assert all(node.startswith("Cascade") for node in loaded_by_comfyui["nodes"])
    assert loaded_by_comfyui["titled"] == loaded_by_comfyui["nodes"]
    assert loaded_by_comfyui["web"]


def test_loading_writes_logs_and_opens_nothing(loaded_by_comfyui):
    assert loaded_by_comfyui["seen"] == []


def test_loading_imports_nothing_heavy(loaded_by_comfyui):
    assert "nodes.loaders" in loaded_by_comfyui["own"]
    packages = {".".join(name.split(".")[:2]) for name in loaded_by_comfyui["own"]}
    assert [name for name in packages if name.split(".")[0] in ("host", "tiny", "benchmarks")] == []
    assert "cascade_ops.training" not in packages
    heavy = {"stable_cascade_nodes", "transformers", "tokenizers", "huggingface_hub", "aiohttp", "scipy"}
    assert heavy & set(loaded_by_comfyui["others"]) == set()


def test_pytest_imports_the_package_once_and_under_its_own_name():
    import stable_cascade_nodes

    files = {stable_cascade_nodes.__file__, str(ROOT / "__init__.py")}
    names = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) in files]
    assert names == ["stable_cascade_nodes"]
