"""The published ControlNets, by their real shapes and without their weights: what they are and what they fit."""

import json
from pathlib import Path

import pytest
import torch
from test_catalog import header_only

from stable_cascade_nodes.cascade_ops import catalog
from stable_cascade_nodes.cascade_ops.attached import fitted_control, stepped_controls
from stable_cascade_nodes.cascade_ops.attachments import apply_control, control_channels, residual_widths
from stable_cascade_nodes.cascade_ops.catalog import ModelFile
from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file
from stable_cascade_nodes.cascade_ops.checkpoints.loading import ParametersWithoutMemory
from stable_cascade_nodes.cascade_ops.control_inputs import ControlInput
from stable_cascade_nodes.cascade_ops.handles import StageHandle
from stable_cascade_nodes.cascade_ops.models import ControlNet, StageC

FOLDER = Path(__file__).parent / "data" / "manifests"
FILES = {
    "canny": "controlnet_canny",
    "inpainting": "controlnet_inpainting",
    "super_resolution": "controlnet_super_resolution",
    "identity": "controlnet_face_identity",
}
# What each reads for a picture of 1024 x 1024; for super-resolution one of 2048 x 2048, from 1024 x 1024.
CONTROLS = {
    "canny": (1, 768, 768),
    "inpainting": (4, 768, 768),
    "super_resolution": (16, 64, 64),
    "identity": (512, 24, 24),
}
STAGES_C = {"3.6B": "stage_c_3.6b", "1B lite": "stage_c_1b_lite"}


def manifest(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def handle(folder, name, stage, network):
    """A stage of a published file's shapes, whose weights are not there."""
    info = inspect_file(header_only(folder / f"{name}.safetensors", manifest(name), "F32"))
    with ParametersWithoutMemory():
        module = network(**info.config)
    return StageHandle(stage, module.to("meta").eval(), info, f"{name}.safetensors")


@pytest.fixture(scope="module")
def stages_c(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return {size: handle(folder, name, "stage_c", StageC) for size, name in STAGES_C.items()}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return {kind: handle(folder, name, "controlnet", ControlNet) for kind, name in FILES.items()}


def control(kind):
    side = 1024
    return ControlInput(kind, torch.zeros(1, *CONTROLS[kind]), (side, side))


@pytest.mark.parametrize("kind", FILES)
def test_the_kind_is_in_the_file(networks, kind):
    network = networks[kind]
    assert network.info.control["kind"] == kind
    assert control_channels(network) == CONTROLS[kind][0]
    assert {name: list(tensor.shape) for name, tensor in network.module.state_dict().items()} == {
        name: list(shape) for name, shape in manifest(FILES[kind]).items()
    }


def test_other_channels_are_no_known_kind(tmp_path):
    """One channel is edges and four are a picture with a hole; another number could be anything."""
    shapes = manifest(FILES["canny"])
    first = shapes["backbone.0.0.weight"]
    for channels, kind in ((1, "canny"), (3, None), (4, "inpainting"), (2, None)):
        changed = shapes | {"backbone.0.0.weight": [first[0], channels, *first[2:]]}
        info = inspect_file(header_only(tmp_path / "x.safetensors", changed, "F32"))
        assert info.control.get("kind") == kind


def test_auto_finds_each_by_its_kind(tmp_path):
    listed = []
    for number, name in enumerate(reversed(FILES.values())):
        path = header_only(tmp_path / f"{number}.safetensors", manifest(name), "F32")
        listed.append(ModelFile(path.name, str(path)))
    for number, kind in enumerate(reversed(FILES)):
        found = catalog.best("controlnet", lambda stage: listed if stage == "controlnet" else [], kind)
        # The bundled Stage C, which auto would take with them, is narrower than they are.
        assert found.name == catalog.BUNDLED
        lone = catalog.part_of(listed[number].path, "controlnet")
        assert lone.control["kind"] == kind
    full = header_only(tmp_path / "c.safetensors", manifest("stage_c_3.6b"))
    of = {"controlnet": listed, "stage_c": [ModelFile("c", str(full))]}
    names = [catalog.best("controlnet", lambda stage: of.get(stage, []), kind).name for kind in reversed(FILES)]
    assert names == [file.name for file in listed]


@pytest.mark.parametrize("kind", FILES)
def test_the_full_stage_c_takes_them_and_the_lite_one_says_why_not(networks, stages_c, kind):
    network, full, lite = networks[kind], stages_c["3.6B"], stages_c["1B lite"]
    assert residual_widths(full.module) == [2048] * 64 and residual_widths(lite.module) == [1536] * 32
    applied = apply_control(full, network, control(kind))
    assert applied.module is full.module and len(applied.controls) == 1
    words = r"up to number 63 with a width of 2048 and Stage C 1B lite .* has 32 of width 1536, .* size of Stage C that"
    with pytest.raises(ValueError, match=words):
        apply_control(lite, network, control(kind))


@pytest.mark.parametrize("kind", FILES)
def test_a_control_of_another_kind_is_refused_by_every_file(networks, stages_c, kind):
    for other in CONTROLS.keys() - {kind}:
        words = rf"with {CONTROLS[other][0]} channels, and .* expected {CONTROLS[kind][0]} channels"
        with pytest.raises(ValueError, match=words):
            apply_control(stages_c["3.6B"], networks[kind], control(other))


@pytest.mark.parametrize("kind", FILES)
def test_residuals_fit_every_block_that_they_steer(networks, stages_c, kind):
    network, side = networks[kind], 48 if kind == "super_resolution" else 24
    applied = apply_control(stages_c["3.6B"], network, control(kind))
    latent = torch.zeros(1, 16, side, side)
    shown = fitted_control(applied.controls[0], latent, (side * 128 // 3,) * 2)
    assert shown.shape[1:] == CONTROLS[kind]
    (stepped,) = stepped_controls(applied, latent, (side * 128 // 3,) * 2, [1.0])
    steered = [index for index, residual in enumerate(stepped.residuals) if residual is not None]
    assert steered == list(network.module.proj_blocks)
    assert {tuple(stepped.residuals[index].shape[:2]) for index in steered} == {(1, 2048)}
