"""The nodes by themselves: what they declare, and the loaders. See `test_nodes_sampling.py` for the others."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nodes_kit import ALL_NODES, TestBackend, load, run

import stable_cascade_nodes
from stable_cascade_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from stable_cascade_nodes.cascade_ops import handles as handles_module
from stable_cascade_nodes.cascade_ops.diffusion import SAMPLERS
from stable_cascade_nodes.cascade_ops.handles import DTYPES
from stable_cascade_nodes.host.object_info import object_info
from stable_cascade_nodes.host.registry import NodeRegistry
from stable_cascade_nodes.nodes import bridge, files, loaders, runtime

ROOT = Path(stable_cascade_nodes.__file__).parent
SNAPSHOT = Path(__file__).parent / "data" / "object_info.json"
IDS = [
    "CascadeLoadStageC",
    "CascadeLoadStageB",
    "CascadeLoadStageA",
    "CascadeLoadTextEncoder",
    "CascadeLoadCheckpoint",
    "CascadeLoadPreviewer",
    "CascadeEncodeText",
    "CascadeEmptyLatent",
    "CascadeSampleStageC",
    "CascadeSampleStageB",
    "CascadeDecodeStageA",
    "CascadePreviewLatent",
    "CascadeLoadLatentEncoder",
    "CascadeLoadImageEncoder",
    "CascadeLoadControlNet",
    "CascadeLoadIPAdapter",
    "CascadeLoadLoRA",
    "CascadeCannyControl",
    "CascadeInpaintControl",
    "CascadeSuperResolutionControl",
    "CascadeApplyControlNet",
    "CascadeApplyIPAdapter",
    "CascadeTrainLoRA",
    "CascadeTrainControlNet",
    "CascadeTrainIPAdapter",
    "CascadeExampleImage",
    "CascadeSelectLatents",
    "CascadeEncodeStageC",
    "CascadeEncodeStageA",
    "CascadeFeatherMask",
    "CascadePadForOutpainting",
    "CascadeImagePrompt",
    "CascadeProposeSize",
    "CascadeLoadFaces",
    "CascadeDetectFaces",
    "CascadeFaceIdentityControl",
    "CascadeReuseInnerBlocks",
    "CascadeAccelerateStageC",
    "CascadeAccelerateStageB",
    "CascadeAccelerateStageA",
]
# Inside ComfyUI only.
BRIDGE_IDS = ["CascadeStageCFromModel", "CascadeStageBFromModel", "CascadeToModel"]


# Declarations --------------------------------------------------------------------------------------------------


def described(with_texts):
    """`object_info` of all nodes where no models are; without texts, which may be improved at any time."""
    registry = NodeRegistry()
    titles = NODE_DISPLAY_NAME_MAPPINGS | bridge.NODE_DISPLAY_NAME_MAPPINGS
    registry.add(ALL_NODES, titles, python_module="custom_nodes.stable_cascade_nodes")
    with runtime.using(TestBackend(Path("no models here"))):
        info = {name: object_info(registry, name) for name in ALL_NODES}
    if not with_texts:
        for node in info.values():
            for key in ("description", "output_tooltips", "display_name"):
                node.pop(key)
            for inputs in node["input"].values():
                for _, options in inputs.values():
                    options.pop("tooltip")
    return info


def test_ids_names_types_and_order_are_frozen():
    """A saved workflow holds widget values by position, an API prompt by name: change nothing, append optional inputs.

    To add to the snapshot, run this file.
    """
    assert described(with_texts=False) == json.loads(SNAPSHOT.read_text())
    assert list(NODE_CLASS_MAPPINGS) == IDS == list(NODE_DISPLAY_NAME_MAPPINGS)
    assert list(bridge.NODE_CLASS_MAPPINGS) == BRIDGE_IDS == list(bridge.NODE_DISPLAY_NAME_MAPPINGS)
    order = {name: node["input_order"] for name, node in json.loads(SNAPSHOT.read_text()).items()}
    for name, node in described(with_texts=True).items():
        assert node["input_order"] == {kind: list(inputs) for kind, inputs in node["input"].items()} == order[name]


def test_everything_is_described():
    for name, node in described(with_texts=True).items():
        assert len(node["description"]) > 30 and node["display_name"].startswith("Cascade: "), name
        assert node["category"].startswith("cascade/"), name
        assert len(node["output"]) == len(node["output_name"]) == len(node["output_tooltips"]), name
        assert all(len(tooltip) > 10 for tooltip in node["output_tooltips"]), name
        for inputs in node["input"].values():
            for entry, (_, options) in inputs.items():
                assert len(options["tooltip"]) > 20, (name, entry)


def test_every_input_is_taken_by_the_function():
    for name, node in ALL_NODES.items():
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        inputs = [entry for kind in node.INPUT_TYPES().values() for entry in kind]
        named = [entry for entry in inputs if entry in parameters]
        assert open_ended or named == inputs, name
        required = {entry for entry, parameter in parameters.items() if parameter.default is parameter.empty}
        optional = node.INPUT_TYPES().get("optional", {})
        assert not required & set(optional), name


def test_lists_of_the_library_are_offered_whole():
    for name in ("CascadeSampleStageC", "CascadeSampleStageB"):
        assert NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]["sampler"][0] == [*SAMPLERS, "auto"]
    assert loaders._DTYPE[0] == list(DTYPES)


def test_importing_the_package_is_light_and_silent(tmp_path):
    code = (
        "import sys, stable_cascade_nodes\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'safetensors', 'aiohttp'} & set(sys.modules)\n"
        "ours = [m for m in sys.modules if m.startswith(('stable_cascade_nodes.host', 'stable_cascade_nodes.tiny'))]\n"
        "assert not heavy and not ours, (heavy, ours)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_package_loads_under_any_folder_name(tmp_path):
    """As ComfyUI does it: from a path, under a module name that it makes of the path."""
    target = tmp_path / "My Cascade-nodes"
    target.mkdir()
    shutil.copy(ROOT / "__init__.py", target)
    for part in ("nodes", "cascade_ops"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import importlib.util, sys\n"
        f"name = {str(target)!r}.replace('.', '_x_')\n"
        f"spec = importlib.util.spec_from_file_location(name, {str(target / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules[name] = module\n"
        "spec.loader.exec_module(module)\n"
        "node = module.NODE_CLASS_MAPPINGS['CascadeLoadStageC']\n"
        "print(node.INPUT_TYPES()['required']['file'][0][0], 'stable_cascade_nodes' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["auto", "False"], done.stderr


# Loaders -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_files_that_are_there_and_says_so(host):
    for name, said in (
        ("CascadeLoadStageC", "Stage C custom (c.safetensors), float32"),
        ("CascadeLoadStageB", "Stage B custom (b.safetensors), float32"),
        ("CascadeLoadStageA", "Stage A custom (a.safetensors), float32"),
        ("CascadeLoadTextEncoder", "text encoder custom (t.safetensors), float32"),
        ("CascadeLoadPreviewer", "previewer custom (p.safetensors), float32"),
    ):
        assert run(name, file="auto")["ui"] == {"text": [said]}
        kind, options = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]["file"]
        assert kind[:2] == ["auto", "tiny (bundled)"] and options["default"] == "auto"


def test_lists_show_the_folders_of_the_stage(empty_host, small_family, combined):
    models = shutil.copytree(small_family.models, empty_host / "models")
    (models / "checkpoints/sub").mkdir(parents=True)
    shutil.copy(combined["b.safetensors"], models / "checkpoints/sub/both.safetensors")
    (models / "diffusion_models/broken.safetensors").write_bytes(b"broken")
    assert files.choices("stage_b") == [
        "auto",
        "tiny (bundled)",
        "b.safetensors",
        "broken.safetensors",
        "c.safetensors",
        "sub/both.safetensors",
    ]
    assert load("CascadeLoadStageB").name == "b.safetensors"
    assert load("CascadeLoadStageB", file="sub/both.safetensors").stage == "stage_b"
    assert load("CascadeLoadStageA", file="sub/both.safetensors").stage == "stage_a"
    with pytest.raises(ValueError, match=r"^broken.safetensors "):
        load("CascadeLoadStageB", file="broken.safetensors")
    with pytest.raises(ValueError, match=r"c.safetensors holds Stage C custom, expected Stage B"):
        load("CascadeLoadStageB", file="c.safetensors")
    with pytest.raises(ValueError, match=r"no file named 'gone.safetensors' was found"):
        load("CascadeLoadStageB", file="gone.safetensors")


def test_bundled_family_serves_where_nothing_else_is(empty_host, small_family):
    with pytest.raises(ValueError, match=r"No stage_c file was found.*put a published stage_c file into models/diff"):
        load("CascadeLoadStageC")
    for stage, path in small_family.paths.items():
        (empty_host / "weights").mkdir(exist_ok=True)
        shutil.copy(path, empty_host / "weights" / f"{stage}.safetensors")
    assert load("CascadeLoadStageC").name == load("CascadeLoadStageC", file="tiny (bundled)").name == "tiny (bundled)"
    everything = run("CascadeLoadCheckpoint", stage_c_file="auto", stage_b_file="auto")["result"][:5]
    assert {handle.name for handle in everything} == {"tiny (bundled)"}


def test_combined_checkpoints(empty_host, small_family, combined, handles):
    (empty_host / "models/checkpoints").mkdir(parents=True)
    for path in combined.values():
        shutil.copy(path, empty_host / "models/checkpoints")
    chosen = run("CascadeLoadCheckpoint", stage_c_file="c.safetensors", stage_b_file="b.safetensors")
    automatic = run("CascadeLoadCheckpoint", stage_c_file="auto", stage_b_file="auto", dtype="bfloat16")
    stages = ["stage_c", "text_encoder", "stage_b", "stage_a", "previewer"]
    for answer in (chosen, automatic):
        assert [handle.stage for handle in answer["result"][:5]] == stages
        assert [handle.name[0] for handle in answer["result"][:5]] == ["c", "c", "b", "b", "c"]
    ours, theirs = chosen["result"][0].module.state_dict(), handles["stage_c"].module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    dtypes = [handle.dtype for handle in automatic["result"][:5]]
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert len(chosen["ui"]["text"]) == 6
    assert chosen["ui"]["text"][5] == "not in these files: image encoder, latent encoder"
    # auto of the single loaders finds the parts too.
    assert load("CascadeLoadStageA").name == "b.safetensors"
    assert load("CascadeLoadTextEncoder").name == "c.safetensors"
    with pytest.raises(ValueError, match="expected Stage C"):
        run("CascadeLoadCheckpoint", stage_c_file="b.safetensors", stage_b_file="b.safetensors")


def test_loaders_notice_another_file(empty_host, small_family):
    models = shutil.copytree(small_family.models, empty_host / "models")
    changed = NODE_CLASS_MAPPINGS["CascadeLoadStageA"].IS_CHANGED
    before = changed(file="auto"), changed(file="a.safetensors")
    assert before == (changed(file="auto"), changed(file="a.safetensors"))
    shutil.copy(models / "vae/a.safetensors", models / "vae/A-first.safetensors")
    assert changed(file="auto") != before[0] and changed(file="a.safetensors") == before[1]
    (models / "checkpoints").mkdir()
    both = NODE_CLASS_MAPPINGS["CascadeLoadCheckpoint"].IS_CHANGED
    (empty_host / "weights").mkdir()
    for stage, path in small_family.paths.items():
        shutil.copy(path, empty_host / "weights" / f"{stage}.safetensors")
    first = both(stage_c_file="auto", stage_b_file="auto", dtype="auto")
    assert first == both(stage_c_file="auto", stage_b_file="auto", dtype="auto")
    (empty_host / "weights/stage_a.safetensors").write_bytes(b"other")
    assert first != both(stage_c_file="auto", stage_b_file="auto", dtype="auto")


def test_loaded_weights_wait_in_main_memory(small_family, monkeypatch):
    asked = []
    real = handles_module.choose_dtype
    monkeypatch.setattr(handles_module, "choose_dtype", lambda *a: asked.append(a[2].type) or real(*a))
    with runtime.using(TestBackend(small_family.models, device="meta")):
        assert load("CascadeLoadStageC").device.type == "cpu"
    assert asked == ["meta"]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(described(with_texts=False), indent=1) + "\n")
