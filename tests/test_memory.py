"""Estimated memory against the tensors that a run of the published sizes keeps alive, counted without computing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from memory_kit import Peak

from stable_cascade_nodes.cascade_ops import memory
from stable_cascade_nodes.cascade_ops.attachments import AppliedControl, AppliedIPAdapter
from stable_cascade_nodes.cascade_ops.checkpoints.loading import ParametersWithoutMemory
from stable_cascade_nodes.cascade_ops.denoisers import TextCondition
from stable_cascade_nodes.cascade_ops.handles import StageHandle
from stable_cascade_nodes.cascade_ops.models import (
    ControlNet,
    IPAdapter,
    LatentEncoder,
    Previewer,
    StageA,
    StageB,
    StageC,
)

CONTROLNETS = {
    "canny": ({"c_in": 1}, (1, 768, 768)),
    "inpainting": ({"c_in": 4}, (4, 768, 768)),
    "super_resolution": ({"c_in": 16, "bottleneck_mode": "large"}, (16, 32, 32)),
    "identity": ({"c_in": 512, "bottleneck_mode": "simple", "proj_blocks": list(range(64))}, (512, 24, 24)),
}
LITE_C = {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]}


@pytest.fixture(autouse=True)
def attention_without_scores(monkeypatch):
    """What fused attention needs: nothing but its result."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q.contiguous()))


def handle(stage, network, dtype, **arguments):
    with ParametersWithoutMemory():
        module = network(**arguments)
    module = module.to("meta", dtype).eval().requires_grad_(False)
    return StageHandle(stage, module, SimpleNamespace(title=stage), "test")


def counted(handle, run):
    peak = Peak(handle.module)
    with torch.no_grad(), peak:
        run(handle.module)
    return peak.most


def empty(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("config", [{}, LITE_C], ids=["3.6B", "1B lite"])
@pytest.mark.parametrize(("batch", "side", "text"), [(1, 24, 77), (4, 24, 77), (1, 64, 77), (1, 24, 231)])
def test_stage_c(config, batch, side, text):
    stage_c = handle("stage_c", StageC, torch.bfloat16, **config)
    halves = 2 * batch

    def run(model):
        prepared = model.prepare(empty(20), empty(halves, text, 1280), empty(halves, 1, 1280), empty(halves, 1, 768))
        model.step(empty(halves, 16, side, side), prepared, 0)

    prompts = [TextCondition(empty(1, text, 1280), empty(1, 1280)), TextCondition(empty(1, 77, 1280), empty(1, 1280))]
    tokens = memory.condition_tokens(stage_c, prompts, [None, None])
    assert tokens == text + 8
    estimate = memory.sampling_bytes(stage_c, (batch, 16, side, side), tokens)
    assert 0.95 < estimate / counted(stage_c, run) < 1.7


@pytest.mark.parametrize(("batch", "side"), [(1, 256), (4, 256), (1, 512)])
def test_stage_b(batch, side):
    stage_b = handle("stage_b", StageB, torch.bfloat16)
    halves = 2 * batch

    def run(model):
        prepared = model.prepare(empty(10), empty(halves, 16, 24, 24), empty(halves, 1, 1280), (side, side))
        model.step(empty(halves, 4, side, side), prepared, 0)

    estimate = memory.sampling_bytes(stage_b, (batch, 4, side, side), 4)
    assert 1 < estimate / counted(stage_b, run) < 1.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [64, 256, 512, 1024])
def test_stage_a(side, dtype):
    stage_a = handle("stage_a", StageA, dtype)
    shape = (3, 4, side, side)
    decoded = counted(stage_a, lambda model: model.decode(empty(1, *shape[1:])))
    assert 1 < memory.decoding_bytes(stage_a, shape) / decoded < 1.4
    encoded = counted(stage_a, lambda model: model.encode(empty(1, 3, 4 * side, 4 * side)))
    assert 1 < memory.autoencoding_bytes(stage_a, shape) / encoded < 1.4


def test_stage_a_on_a_cpu_which_works_in_smaller_strips():
    stage_a = StageHandle("stage_a", small_stage_a(), SimpleNamespace(title="stage_a"), "test")
    shape = (1, 4, 128, 128)
    decoded = counted(stage_a, lambda model: model.decode(torch.zeros(shape)))
    assert 1 < memory.decoding_bytes(stage_a, shape, on_cpu=True) / decoded < 2
    assert memory.decoding_bytes(stage_a, shape, on_cpu=True) < memory.decoding_bytes(stage_a, shape)


def small_stage_a():
    return StageA(c_hidden=48, bottleneck_blocks=1).eval().requires_grad_(False)


def test_previewer():
    previewer = handle("previewer", Previewer, torch.float32)
    for side in (64, 256):
        estimate = memory.preview_bytes(previewer, (2, 16, side, side))
        assert 1 < estimate / counted(previewer, lambda model, side=side: model(empty(2, 16, side, side))) < 1.4


@pytest.mark.parametrize("needs", [memory.decoding_bytes, memory.autoencoding_bytes])
def test_a_picture_that_does_not_fit_is_decoded_in_the_largest_tiles_that_do(needs):
    stage_a = StageHandle("stage_a", StageA().requires_grad_(False), SimpleNamespace(title="stage_a"), "test")
    shape, spare = (1, 4, 1024, 1024), 256 * 2**20
    whole = needs(stage_a, shape, on_cpu=True)
    assert memory.fitting_tile(stage_a, shape, 0, needs, whole + spare) == (0, [])
    tile, said = memory.fitting_tile(stage_a, shape, 0, needs, whole + spare - 1)
    assert tile == 2048
    assert said[0].startswith(f"in tiles of 2048 pixels, since the whole picture would need {whole / 1e9:.1f} GB and ")
    for free in (spare + needs(stage_a, shape, 512, on_cpu=True), spare + needs(stage_a, shape, 1024, on_cpu=True) - 1):
        assert memory.fitting_tile(stage_a, shape, 0, needs, free)[0] == 512
    assert memory.fitting_tile(stage_a, shape, 0, needs, 0)[0] == 256
    # Who asks for a tile gets it.
    assert memory.fitting_tile(stage_a, shape, 4096, needs, 0) == (4096, [])


@pytest.mark.parametrize("kind", CONTROLNETS)
def test_controlnets(kind):
    """What is counted while one runs, and its residuals after that in the dtype of Stage C and as a float32 sum."""
    config, shape = CONTROLNETS[kind]
    stage_c, network = (
        handle("stage_c", StageC, torch.bfloat16),
        handle("controlnet", ControlNet, torch.float32, **config),
    )
    running = counted(network, lambda model: model(empty(1, *shape)))
    residuals = [r for r in network.module(empty(1, *shape)) if r is not None]
    kept = sum(r.numel() for r in residuals) * (2 + 4)
    applied = AppliedControl(network, empty(1, *shape))
    steered = replace(stage_c, controls=(applied,))
    assert 1 < memory.attached_bytes(steered, (1, 16, 24, 24)) / (running + kept) < 1.8
    assert memory.attached_bytes(replace(steered, controls=(replace(applied, strength=0.0),)), (1, 16, 24, 24)) == 0
    assert memory.attached_bytes(stage_c, (1, 16, 24, 24)) == 0


def test_ip_adapter():
    stage_c = handle("stage_c", StageC, torch.bfloat16)
    adapter = handle("ip_adapter", IPAdapter, torch.bfloat16, **IPAdapter.config_for(stage_c.module, 768))
    kept = adapter.module.attention(empty(6, 2, 768)).key_values
    reading = replace(stage_c, ip_adapters=(AppliedIPAdapter(adapter, empty(1, 2, 768)),))
    expected = sum(kv.numel() * kv.element_size() for kv in kept)
    assert memory.attached_bytes(reading, (3, 16, 24, 24)) == expected
    assert memory.attached_bytes(reading, (3, 16, 24, 24), guided=False) == expected / 2


def test_latent_encoder():
    encoder = handle("latent_encoder", LatentEncoder, torch.float32)
    for height, width in ((768, 768), (1024, 512)):
        estimate = memory.encoding_bytes(encoder, (height, width))
        assert 1 < estimate / counted(encoder, lambda model, h=height, w=width: model(empty(1, 3, h, w))) < 1.4
