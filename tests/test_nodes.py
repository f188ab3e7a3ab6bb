"""The nodes by themselves: what they declare, what they answer, what they refuse."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stable_cascade_nodes
from stable_cascade_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from stable_cascade_nodes.cascade_ops import catalog
from stable_cascade_nodes.cascade_ops import handles as handles_module
from stable_cascade_nodes.cascade_ops.diffusion import SAMPLERS
from stable_cascade_nodes.cascade_ops.handles import DTYPES
from stable_cascade_nodes.host.object_info import object_info
from stable_cascade_nodes.host.registry import NodeRegistry
from stable_cascade_nodes.nodes import files, loaders, locale, runtime

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
]


class Bar:
    def __init__(self, backend, total):
        self.backend, self.total = backend, total

    def update(self, value, preview=None):
        self.backend.seen.append((value, self.total, preview))
        if self.backend.stop_at == value:
            raise KeyboardInterrupt


class TestBackend(runtime.PlainBackend):
    """Models in one folder; remembers progress, and stops a run where it is told to."""

    __test__ = False

    def __init__(self, root, device="cpu"):
        self.root, self.seen, self.stop_at, self.freed = root, [], None, []
        self._device = torch.device(device)

    def device(self):
        return self._device

    def progress(self, total):
        return Bar(self, total)

    def model_files(self, folder):
        return runtime.list_models([self.root], folder)

    def model_path(self, folder, name):
        return runtime.find_model([self.root], folder, name)

    def free_memory(self, size):
        self.freed.append(size)


@pytest.fixture
def host(small_family):
    backend = TestBackend(small_family.models)
    with runtime.using(backend):
        yield backend


@pytest.fixture
def empty_host(tmp_path):
    """No files of the user's, and no bundled ones but those that a test puts there."""
    with runtime.using(TestBackend(tmp_path / "models")) as _, pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "_BUNDLED_FOLDER", tmp_path / "weights")
        yield tmp_path


def run(name, **inputs):
    node = NODE_CLASS_MAPPINGS[name]
    answer = getattr(node(), node.FUNCTION)(**inputs)
    return answer if isinstance(answer, dict) else {"ui": {}, "result": answer}


def load(name, **inputs):
    return run(name, **({"file": "auto"} | inputs))["result"][0]


def sample_c(host, **changes):
    encoder = load("CascadeLoadTextEncoder")
    encode = {text: run("CascadeEncodeText", text_encoder=encoder, text=text)["result"][0] for text in ("red", "")}
    stage_c = changes.pop("stage_c", None) or load("CascadeLoadStageC")
    latent = run("CascadeEmptyLatent", stage_c=stage_c, width=100, height=60, batch_size=1)["result"][0]
    inputs = {
        "stage_c": stage_c,
        "positive": encode["red"],
        "negative": encode[""],
        "latent": latent,
        "seed": 1,
        "steps": 2,
        "guidance": 0.0,
        "sampler": "ddpm",
    }
    return run("CascadeSampleStageC", **inputs | changes), inputs


def sample_b(host, **changes):
    first, inputs = sample_c(host)
    inputs = inputs | {"latent": first["result"][0], "stage_b": load("CascadeLoadStageB")}
    inputs.pop("stage_c")
    return run("CascadeSampleStageB", **inputs | changes), inputs


# Declarations --------------------------------------------------------------------------------------------------


def described(with_texts):
    """`object_info` of all nodes where no models are; without texts, which may be improved at any time."""
    registry = NodeRegistry()
    registry.add(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, python_module="custom_nodes.stable_cascade_nodes")
    with runtime.using(TestBackend(Path("no models here"))):
        info = {name: object_info(registry, name) for name in NODE_CLASS_MAPPINGS}
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
    for name, node in NODE_CLASS_MAPPINGS.items():
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
        assert NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]["sampler"][0] == list(SAMPLERS)
    assert loaders._DTYPE[0] == list(DTYPES)


def test_help_pages_name_every_input_and_output():
    pages = {path.stem: path.read_text() for path in (ROOT / "web/docs").glob("*.md")}
    for name, node in NODE_CLASS_MAPPINGS.items():
        page = pages[name]
        assert page.startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}\n"), name
        entries = [entry for kind in node.INPUT_TYPES().values() for entry in kind]
        for entry in (*entries, *node.RETURN_NAMES):
            assert f"| `{entry}`" in page or f", `{entry}` |" in page, (name, entry)
    assert all(name.split("/")[0] in NODE_CLASS_MAPPINGS for name in pages)


def test_locale_file_is_what_the_nodes_say():
    assert locale.PATH.read_text(encoding="utf-8") == locale.written(), (
        "run: python -m stable_cascade_nodes.nodes.locale"
    )
    texts = json.loads(locale.PATH.read_text(encoding="utf-8"))
    assert texts["CascadeSampleStageC"]["inputs"]["seed"]["tooltip"].startswith("Another seed")


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
    everything = run("CascadeLoadCheckpoint", stage_c_file="auto", stage_b_file="auto")["result"]
    assert {handle.name for handle in everything} == {"tiny (bundled)"}


def test_combined_checkpoints(empty_host, small_family, combined, handles):
    (empty_host / "models/checkpoints").mkdir(parents=True)
    for path in combined.values():
        shutil.copy(path, empty_host / "models/checkpoints")
    chosen = run("CascadeLoadCheckpoint", stage_c_file="c.safetensors", stage_b_file="b.safetensors")
    automatic = run("CascadeLoadCheckpoint", stage_c_file="auto", stage_b_file="auto", dtype="bfloat16")
    stages = ["stage_c", "text_encoder", "stage_b", "stage_a", "previewer"]
    for answer in (chosen, automatic):
        assert [handle.stage for handle in answer["result"]] == stages
        assert [handle.name[0] for handle in answer["result"]] == ["c", "c", "b", "b", "c"]
    ours, theirs = chosen["result"][0].module.state_dict(), handles["stage_c"].module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    dtypes = [handle.dtype for handle in automatic["result"]]
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert len(chosen["ui"]["text"]) == 5
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


# Sampling ------------------------------------------------------------------------------------------------------


def test_whole_chain_by_hand(host):
    detail, _ = sample_b(host)
    latent = detail["result"][0]
    assert (latent["width"], latent["height"], latent["samples"].shape) == (100, 60, (1, 4, 16, 26))
    image = run("CascadeDecodeStageA", stage_a=load("CascadeLoadStageA"), latent=latent)["result"][0]
    assert image.shape == (1, 60, 100, 3) and image.dtype == torch.float32 and image.std() > 0.01
    small, _ = sample_c(host)
    preview = run("CascadePreviewLatent", previewer=load("CascadeLoadPreviewer"), latent=small["result"][0])["result"]
    assert preview[0].shape == (1, 16, 24, 3)


def test_sampling_reports_every_step_and_shows_previews(host):
    sample_c(host)
    assert [entry[:2] for entry in host.seen] == [(1, 2), (2, 2)] and host.seen[0][2] is None
    host.seen.clear()
    plain, _ = sample_c(host)
    host.seen.clear()
    shown, _ = sample_c(host, previewer=load("CascadeLoadPreviewer"))
    assert [(entry[0], entry[2].size) for entry in host.seen] == [(1, (24, 16)), (2, (24, 16))]
    assert torch.equal(plain["result"][0]["samples"], shown["result"][0]["samples"])
    host.seen.clear()
    sample_b(host, stage_a=load("CascadeLoadStageA"))
    assert [(entry[0], entry[2] and entry[2].size) for entry in host.seen[2:]] == [(1, (104, 64)), (2, (104, 64))]


def test_a_run_can_be_stopped_at_every_step_and_picture(host):
    for node in (sample_c, sample_b):
        host.stop_at = None
        _, inputs = node(host)
        for step in (1, 2):
            host.stop_at = step
            with pytest.raises(KeyboardInterrupt):
                run("CascadeSampleStageC" if node is sample_c else "CascadeSampleStageB", **inputs)
    host.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run("CascadeDecodeStageA", stage_a=load("CascadeLoadStageA"), latent={"samples": torch.zeros(2, 4, 8, 8)})


OPTIONS = {
    "shift": 3.0,
    "guidance_end": 1.0,
    "guidance_from": 0.6,
    "guidance_until": 0.6,
    "rescale": 0.1,
    "end": 0.3,
    "start": 0.5,
    "sampler": "euler",
    "guidance": 2.0,
    "steps": 3,
    "seed": 2,
}


@pytest.mark.parametrize("node", ["CascadeSampleStageC", "CascadeSampleStageB"])
def test_every_option_acts_and_its_default_is_the_plain_run(host, node):
    result, inputs = (sample_c if node == "CascadeSampleStageC" else sample_b)(host)
    plain = result["result"][0]["samples"]
    declared = NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["optional"]
    defaults = {name: options["default"] for name, (_, options) in declared.items() if "default" in options}
    assert torch.equal(run(node, **inputs, **defaults)["result"][0]["samples"], plain)
    assert set(defaults) - set(OPTIONS) == {"rescale_over"}
    for name, value in OPTIONS.items():
        start = {"start_latent": {"samples": plain}} if (name, node) == ("start", "CascadeSampleStageB") else {}
        changed = run(node, **inputs | {name: value} | start)["result"][0]["samples"]
        assert not torch.allclose(changed, plain, rtol=1e-3), name
    # Over the batch needs a batch to differ.
    pair = inputs | {"latent": inputs["latent"] | {"samples": inputs["latent"]["samples"].expand(2, -1, -1, -1)}}
    each, together = (run(node, **pair, rescale_over=over)["result"][0]["samples"] for over in ("image", "batch"))
    assert not torch.allclose(each, together, rtol=1e-3)


def test_inputs_are_not_changed(host):
    def snapshot(inputs):
        tensors = {
            "samples": inputs["latent"]["samples"],
            "hidden": inputs["positive"][0][0],
            "pooled": inputs["positive"][0][1]["pooled_output"],
        }
        handle = inputs.get("stage_c") or inputs["stage_b"]
        tensors |= handle.module.state_dict()
        keys = sorted(inputs["latent"]), sorted(inputs["positive"][0][1])
        return keys, {name: hash(tensor.numpy().tobytes()) for name, tensor in tensors.items()}

    for node, name in ((sample_c, "CascadeSampleStageC"), (sample_b, "CascadeSampleStageB")):
        _, inputs = node(host)
        before = snapshot(inputs)
        first, second = (run(name, **inputs)["result"][0]["samples"] for _ in range(2))
        assert torch.equal(first, second)
        assert snapshot(inputs) == before


def test_works_in_inference_mode(host):
    """ComfyUI runs nodes in it."""
    plain, _ = sample_b(host)
    with torch.inference_mode():
        inside, _ = sample_b(host)
    assert torch.equal(plain["result"][0]["samples"], inside["result"][0]["samples"])


def test_previewer_of_another_family_is_left_out_and_that_is_said(host):
    previewer = load("CascadeLoadPreviewer")
    tiny = replace(previewer, info=replace(previewer.info, size="tiny", rank=3))
    stage_c = load("CascadeLoadStageC")
    release = replace(stage_c, info=replace(stage_c.info, rank=0))
    host.seen.clear()
    answer, _ = sample_c(host, stage_c=release, previewer=tiny)
    assert answer["ui"]["text"][1].startswith("no live previews: previewer tiny (p.safetensors) belongs to another")
    assert [entry[2] for entry in host.seen] == [None, None]
    with pytest.raises(ValueError, match="belongs to the bundled tiny family"):
        run("CascadePreviewLatent", previewer=tiny, latent=answer["result"][0])


def test_text_of_another_encoder_is_refused_by_the_node(host):
    _, inputs = sample_c(host)
    inputs["positive"] = [[torch.zeros(1, 77, 1280), {"pooled_output": torch.zeros(1, 1280)}]]
    with pytest.raises(ValueError, match="encoded 1280 wide"):
        run("CascadeSampleStageC", **inputs)


def test_embeddings_come_from_the_models_folder(empty_host, small_family):
    from safetensors.torch import save_file

    models = shutil.copytree(small_family.models, empty_host / "models")
    (models / "embeddings").mkdir()
    save_file({"clip_g": torch.ones(2, 64)}, models / "embeddings/glow.safetensors")
    encoder = load("CascadeLoadTextEncoder")

    def encode(text):
        return run("CascadeEncodeText", text_encoder=encoder, text=text)["result"][0][0][0]

    assert not torch.allclose(encode("red embedding:glow"), encode("red"))
    with pytest.raises(ValueError, match="'gloom', which was not found"):
        encode("red embedding:gloom")


def test_device_gets_room_and_a_copy(small_family, handles):
    from stable_cascade_nodes.nodes.placing import on_device

    backend = TestBackend(small_family.models, device="meta")
    with runtime.using(backend):
        moved = on_device(handles["stage_b"])
        assert moved.device.type == "meta" and handles["stage_b"].device.type == "cpu"
        assert backend.freed == [handles["stage_b"].size_in_bytes]
        assert on_device(moved) is moved and len(backend.freed) == 1
    assert handles["stage_b"].size_in_bytes == 4 * sum(p.numel() for p in handles["stage_b"].module.parameters())


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(described(with_texts=False), indent=1) + "\n")
