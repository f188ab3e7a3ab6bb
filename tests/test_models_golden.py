"""Every network computes what the published architecture computes, under the published names."""

import json

import pytest
import torch
from golden import DATA, build, read_golden, relative_error

from stable_cascade_nodes.cascade_ops.models import (
    ControlNet,
    LatentEncoder,
    Previewer,
    StageA,
    StageB,
    StageC,
)
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet

TOLERANCE = 1e-4
STAGE_C_LITE = {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]}
STAGE_B_LITE = {
    "c_hidden": [320, 576, 1152, 1152],
    "nhead": [-1, 9, 18, 18],
    "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
}
MANIFESTS = {
    "stage_c_3.6b": (StageC, {}),
    "stage_c_1b_lite": (StageC, STAGE_C_LITE),
    "stage_b_1.5b": (StageB, {}),
    "stage_b_700m_lite": (StageB, STAGE_B_LITE),
    "stage_a": (StageA, {}),
    "effnet_encoder": (LatentEncoder, {}),
    "previewer": (Previewer, {}),
    "controlnet_canny": (ControlNet, {"c_in": 1}),
    "controlnet_inpainting": (ControlNet, {"c_in": 4}),
    "controlnet_super_resolution": (ControlNet, {"c_in": 16, "bottleneck_mode": "large"}),
    "controlnet_face_identity": (ControlNet, {"c_in": 512, "bottleneck_mode": "simple", "proj_blocks": range(64)}),
}
STAGE_C_GOLDEN = ["stage_c_two_level", "stage_c_switch_level"]
STAGE_B_GOLDEN = ["stage_b", "stage_b_odd"]
CONTROLNETS = ["controlnet_effnet_c1", "controlnet_effnet_c4", "controlnet_large", "controlnet_simple"]

# The size conditions behind `output_sca_crp` and `output_sca`, one value per picture.
STAGE_C_SIZES = {"sca": torch.tensor([0.2, 0.7]), "crp": torch.tensor([0.5, 0.1])}
STAGE_B_SCA = torch.tensor([0.3, 0.6])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def text_inputs(tensors: dict) -> dict:
    return {name: tensors[name] for name in ("clip_text", "clip_text_pooled", "clip_img")}


def test_every_manifest_has_a_test():
    assert set(MANIFESTS) == {path.stem for path in (DATA / "manifests").glob("*.json")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_names_and_shapes(name):
    cls, config = MANIFESTS[name]
    with torch.device("meta"):
        module = cls(**config)
    assert shapes(module) == json.loads((DATA / "manifests" / f"{name}.json").read_text())


@pytest.mark.parametrize("path", sorted((DATA / "golden").glob("*.keys.json")), ids=lambda p: p.name)
def test_golden_names_and_shapes(path):
    name = path.name.removesuffix(".keys.json")
    _, metadata = read_golden(name)
    kinds = {"stage_a": StageA, "stage_b": StageB, "stage_c": StageC, "controlnet": ControlNet}
    cls = next(kind for prefix, kind in kinds.items() if name.startswith(prefix))
    with torch.device("meta"):
        module = cls(**metadata["config"])
    assert shapes(module) == json.loads(path.read_text())


@pytest.mark.parametrize("name", STAGE_C_GOLDEN)
def test_stage_c(name):
    tensors, metadata = read_golden(name)
    model, text = build(StageC, metadata), text_inputs(tensors)
    x, r = tensors["x"], tensors["r"]
    assert relative_error(model(x, r, **text), tensors["output"]) < TOLERANCE
    assert relative_error(model(x, r, **text, **STAGE_C_SIZES), tensors["output_sca_crp"]) < TOLERANCE


def test_stage_c_control_residuals():
    tensors, metadata = read_golden("stage_c_two_level")
    model = build(StageC, metadata)
    control = [tensors.get(f"control.{i}") for i in range(10)]
    output = model(tensors["x"], tensors["r"], **text_inputs(tensors), control=control)
    assert relative_error(output, tensors["output_control"]) < TOLERANCE


@pytest.mark.parametrize("name", STAGE_B_GOLDEN)
def test_stage_b(name):
    tensors, metadata = read_golden(name)
    model = build(StageB, metadata)
    inputs = [tensors[key] for key in ("x", "r", "effnet", "clip")]
    assert relative_error(model(*inputs), tensors["output"]) < TOLERANCE
    assert relative_error(model(*inputs, pixels=tensors["pixels"]), tensors["output_pixels"]) < TOLERANCE
    assert relative_error(model(*inputs, sca=STAGE_B_SCA), tensors["output_sca"]) < TOLERANCE


def test_stage_a():
    tensors, metadata = read_golden("stage_a")
    model = build(StageA, metadata)
    latent, quantized, indices = model.encode(tensors["image"], quantize=True)
    assert relative_error(latent, tensors["latent"]) < TOLERANCE
    assert relative_error(quantized, tensors["latent_quantized"]) < TOLERANCE
    assert torch.equal(indices, tensors["indices"])
    assert relative_error(model.decode(tensors["latent"]), tensors["decoded"]) < TOLERANCE


def test_latent_encoder():
    tensors, metadata = read_golden("effnet_encoder")
    latent = build(LatentEncoder, metadata)(normalize_imagenet(tensors["image"]))
    assert relative_error(latent, tensors["latent"]) < TOLERANCE


def test_previewer():
    tensors, metadata = read_golden("previewer")
    assert relative_error(build(Previewer, metadata)(tensors["latent"]), tensors["image"]) < TOLERANCE


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnet(name):
    tensors, metadata = read_golden(name)
    residuals = build(ControlNet, metadata)(tensors["input"])
    steered = metadata["config"]["proj_blocks"]
    assert [i for i, residual in enumerate(residuals) if residual is not None] == steered
    for i in steered:
        assert relative_error(residuals[i], tensors[f"residual.{i}"]) < TOLERANCE
