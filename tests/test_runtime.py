"""The seam between the nodes and their host: which backend answers, and what each of them says."""

import os
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

from stable_cascade_nodes.host.backend import HostBackend
from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.nodes import runtime


class Interrupted(Exception):
    pass


@pytest.fixture
def comfyui(monkeypatch, tmp_path):
    """Stand-ins for the modules of ComfyUI that the seam talks to."""
    calls = []
    state = SimpleNamespace(interrupted=False, calls=calls, root=tmp_path, dtype=torch.bfloat16)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "a.safetensors").write_bytes(b"")

    paths = ModuleType("folder_paths")
    paths.folder_names_and_paths = {"vae": ([str(tmp_path / "vae")], {".safetensors"}), "unet": ([], set())}
    paths.get_filename_list = lambda name: {"vae": ["a.safetensors"], "unet": ["old.safetensors"]}[name]
    paths.get_full_path = lambda name, file: str(tmp_path / name / file) if (tmp_path / name / file).is_file() else None
    paths.get_folder_paths = lambda name: paths.folder_names_and_paths[name][0]
    paths.models_dir = str(tmp_path)
    paths.get_output_directory = lambda: "/comfy/output"
    paths.get_input_directory = lambda: "/comfy/input"
    paths.get_temp_directory = lambda: "/comfy/temp"

    management = ModuleType("comfy.model_management")
    management.get_torch_device = lambda: torch.device("meta")
    management.unet_offload_device = management.text_encoder_offload_device = lambda: torch.device("cpu")
    management.text_encoder_device = lambda: torch.device("cpu")
    management.unet_dtype = lambda device, model_params, supported_dtypes: state.dtype

    def check():
        if state.interrupted:
            raise Interrupted

    management.throw_exception_if_processing_interrupted = check
    management.unload_all_models = lambda: calls.append("unloaded")
    management.soft_empty_cache = lambda: calls.append("emptied")

    class Bar:
        def __init__(self, total):
            calls.append(("bar", total))

        def update_absolute(self, value, total=None, preview=None):
            calls.append(("update", value, total, preview))

    utils = ModuleType("comfy.utils")
    utils.ProgressBar = Bar
    options = ModuleType("comfy.cli_args")
    options.LatentPreviewMethod = SimpleNamespace(NoPreviews="none")
    options.args = state.args = SimpleNamespace(preview_size=300, preview_method="none")
    for module in (ModuleType("comfy"), paths, management, utils, options):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return state


def test_comfyui_answers_once_it_is_loaded(comfyui):
    assert runtime.device() == torch.device("meta") and runtime.device("text_encoder") == torch.device("cpu")
    assert runtime.output_directory() == "/comfy/output"
    assert runtime.input_directory() == "/comfy/input"
    assert runtime.temp_directory() == "/comfy/temp"
    assert runtime.model_files("vae") == ["a.safetensors"]
    assert runtime.model_path("vae", "a.safetensors") == str(comfyui.root / "vae" / "a.safetensors")
    with pytest.raises(ValueError, match=r"vae: no file named 'b\.safetensors'.*put it in"):
        runtime.model_path("vae", "b.safetensors")
    assert not runtime.shows_previews()
    comfyui.args.preview_method = "auto"
    assert runtime.shows_previews()


def test_comfyuis_settings_say_the_dtype_as_far_as_anything_runs_in_it(comfyui):
    for setting, answer in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float8_e4m3fn, None),
    ):
        comfyui.dtype = setting
        assert runtime.dtype("stage_c", 10**9) == answer
        assert runtime.dtype("text_encoder", 10**9) is None


def test_an_older_comfyui_knows_a_folder_by_its_former_name(comfyui):
    assert runtime.model_files("diffusion_models") == ["old.safetensors"]


def test_new_files_go_into_the_first_folder_of_their_kind(comfyui, tmp_path, monkeypatch):
    sys.modules["folder_paths"].folder_names_and_paths["unet"][0].extend(["/comfy/unet", "/other/unet"])
    assert runtime.model_directory("diffusion_models") == "/comfy/unet"
    monkeypatch.setenv("CASCADE_MODELS", str(tmp_path / "more"))
    with runtime.using(HostBackend(DataFolders(tmp_path / "host"))):
        assert runtime.model_directory("loras") == str(tmp_path / "host" / "models" / "loras")
    with runtime.using(runtime.PlainBackend()):
        assert runtime.model_directory("loras") == os.path.abspath(os.path.join("models", "loras"))


def test_faces_have_a_folder_that_comfyui_does_not_know(comfyui, tmp_path, monkeypatch):
    """What lies there is found, where packs or settings say another place too, and `folder_paths` stays as it is."""
    paths = sys.modules["folder_paths"]
    before = dict(paths.folder_names_and_paths)
    assert runtime.model_files("insightface") == []
    assert runtime.model_directory("insightface") == str(tmp_path / "insightface")
    for place in ("insightface/models/buffalo_l/det.onnx", "elsewhere/det_2.onnx", "insightface/notes.safetensors"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"")
    assert runtime.model_files("insightface") == ["models/buffalo_l/det.onnx"]
    assert paths.folder_names_and_paths == before
    paths.folder_names_and_paths["insightface"] = ([str(tmp_path / "elsewhere")], set())
    assert runtime.model_files("insightface") == ["det_2.onnx", "models/buffalo_l/det.onnx"]
    assert runtime.model_path("insightface", "det_2.onnx") == str(tmp_path / "elsewhere" / "det_2.onnx")
    found = runtime.model_path("insightface", "models/buffalo_l/det.onnx")
    assert found == str(tmp_path / "insightface" / "models" / "buffalo_l" / "det.onnx")
    assert runtime.model_directory("insightface") == str(tmp_path / "elsewhere")
    for name in ("../vae/a.safetensors", "none.onnx"):
        with pytest.raises(ValueError, match="insightface: "):
            runtime.model_path("insightface", name)
    monkeypatch.setenv("CASCADE_MODELS", str(tmp_path))
    for backend in (HostBackend(DataFolders(tmp_path / "host")), runtime.PlainBackend()):
        with runtime.using(backend):
            assert runtime.model_files("insightface") == ["models/buffalo_l/det.onnx"]
            assert runtime.model_path("insightface", "models/buffalo_l/det.onnx") == found


def test_room_is_made_by_taking_everything_off_the_device(comfyui):
    runtime.make_room()
    assert comfyui.calls == ["unloaded", "emptied"]


def test_comfyuis_bar_shows_previews_and_stops_the_run(comfyui):
    picture = object()
    bar = runtime.progress(4)
    bar.update(1)
    bar.update(2, picture)
    assert comfyui.calls == [("bar", 4), ("update", 1, 4, None), ("update", 2, 4, ("JPEG", picture, 300))]
    runtime.check_interrupted()
    comfyui.interrupted = True
    with pytest.raises(Interrupted):
        bar.update(3)
    with pytest.raises(Interrupted):
        runtime.check_interrupted()
    assert len(comfyui.calls) == 3


def test_the_running_host_goes_before_comfyui(comfyui, tmp_path):
    host = HostBackend(DataFolders(tmp_path / "host"))
    with runtime.using(host):
        assert runtime.output_directory() == str(tmp_path / "host" / "output")
    assert runtime.output_directory() == "/comfy/output"
    runtime.use(host)
    try:
        assert runtime.output_directory() == str(tmp_path / "host" / "output")
        with runtime.using(HostBackend(DataFolders(tmp_path / "inner"))):
            assert runtime.output_directory() == str(tmp_path / "inner" / "output")
    finally:
        runtime.use(None)
    assert runtime.output_directory() == "/comfy/output"


def test_using_holds_for_its_own_thread_only(tmp_path):
    seen = []
    with runtime.using(HostBackend(DataFolders(tmp_path))):
        worker = threading.Thread(target=lambda: seen.append(runtime.output_directory()))
        worker.start()
        worker.join()
        assert runtime.output_directory() == str(tmp_path / "output")
    assert seen == [os.path.abspath("output")]


def test_without_a_host_models_come_from_the_current_folder_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASCADE_MODELS", raising=False)
    (tmp_path / "models" / "vae").mkdir(parents=True)
    (tmp_path / "models" / "vae" / "here.safetensors").write_bytes(b"")
    assert runtime.model_files("vae") == ["here.safetensors"]
    assert runtime.model_files("loras") == []
    for name in ("one", "two"):
        (tmp_path / name / "vae" / "sub").mkdir(parents=True)
        (tmp_path / name / "vae" / "sub" / f"{name}.safetensors").write_bytes(b"")
        (tmp_path / name / "vae" / "both.safetensors").write_text(name)
    monkeypatch.setenv("CASCADE_MODELS", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    found = ["both.safetensors", "here.safetensors", "sub/one.safetensors", "sub/two.safetensors"]
    assert runtime.model_files("vae") == found
    assert runtime.model_path("vae", "both.safetensors") == str(tmp_path / "one" / "vae" / "both.safetensors")
    assert runtime.model_path("vae", "sub\\two.safetensors").endswith("two.safetensors")


def test_without_a_host_progress_is_silent_and_the_device_is_real():
    bar = runtime.progress(3)
    assert bar.update(1) is None
    assert runtime.check_interrupted() is None
    assert runtime.device().type in ("cpu", "cuda")
    assert runtime.placed([]) == [] and runtime.dtype("stage_c", 10**9) is None and not runtime.shows_previews()


def test_model_lists_hold_model_files_of_former_folders_too(tmp_path):
    for name in ("unet/a.safetensors", "diffusion_models/b.ckpt", "diffusion_models/notes.txt", "unet/.hidden.sft"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    backend = HostBackend(DataFolders(tmp_path))
    assert backend.model_files("diffusion_models") == ["a.safetensors", "b.ckpt"]
    assert backend.model_path("diffusion_models", "a.safetensors").endswith(os.path.join("unet", "a.safetensors"))


def test_a_link_that_points_upwards_ends(tmp_path):
    folder = tmp_path / "models" / "vae" / "sub"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"")
    os.symlink(tmp_path / "models" / "vae", folder / "up")
    assert HostBackend(DataFolders(tmp_path)).model_files("vae") == ["sub/a.safetensors"]


def test_a_link_to_a_file_that_is_gone_is_not_listed(tmp_path):
    folder = tmp_path / "models" / "vae"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"")
    os.symlink(tmp_path / "gone.safetensors", folder / "dangling.safetensors")
    assert HostBackend(DataFolders(tmp_path)).model_files("vae") == ["a.safetensors"]


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "../secret.safetensors", "/etc/passwd", "..\\secret.safetensors"]
)
def test_missing_and_outside_models_are_refused_in_words(tmp_path, name):
    (tmp_path / "models" / "vae").mkdir(parents=True)
    (tmp_path / "models" / "secret.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^vae: "):
        HostBackend(DataFolders(tmp_path)).model_path("vae", name)


def test_an_unknown_folder_is_refused():
    with pytest.raises(ValueError, match="not a model folder"):
        runtime.model_files("secrets")


def test_the_seam_imports_no_host_and_nothing_heavy():
    code = (
        "import sys; from stable_cascade_nodes.nodes import runtime; "
        "bad = [m for m in sys.modules if '.host' in m or m in ('torch', 'transformers', 'PIL', 'numpy')]; "
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
