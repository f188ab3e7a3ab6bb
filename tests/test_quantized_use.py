"""Weights of 8 bits in use: other devices, LoRAs, ControlNets and IP-Adapters, hosts, training, pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lora_kit import deltas, random_lora
from quantized_kit import FORMATS, FUSED, LAST, OUT, inputs, predicted, relative, saved_stage_c
from streaming_kit import LateLane

from stable_cascade_nodes.cascade_ops import memory
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, LoRAWeights, apply_lora
from stable_cascade_nodes.cascade_ops.adapters.merging import unmerged
from stable_cascade_nodes.cascade_ops.adapters.rounding import rounded
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.quantized import QuantizedLinear, weight_of
from stable_cascade_nodes.cascade_ops.streaming import streamed, streaming_plan
from stable_cascade_nodes.cascade_ops.streaming_plan import least_bytes
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.tiny.captions import caption_full
from stable_cascade_nodes.tiny.evaluate import measured_scenes, shares

THIRD = OUT.replace("out_proj", "to_k")


@pytest.fixture(params=FORMATS)
def choice(request):
    return request.param


@pytest.fixture
def small(tmp_path, choice):
    """A Stage C in 8 bits."""
    return load_stage(saved_stage_c(tmp_path / "c.safetensors"), "stage_c", dtype=choice)


def tensors(handle):
    return [*handle.network.parameters(), *handle.network.buffers()]


def test_another_device_gets_a_copy_in_8_bits(small):
    there = small.to("meta")
    assert there.device.type == "meta" and small.device.type == "cpu" and there.title == small.title
    assert all(tensor.is_meta for tensor in tensors(there)) and not any(tensor.is_meta for tensor in tensors(small))
    assert there.size_in_bytes == small.size_in_bytes and there.dtype == small.dtype
    given = {name: tensor.to("meta") for name, tensor in inputs().items()}
    assert predicted(there.module, given).shape == (2, 16, 6, 5)


def test_memory_to_run_in_counts_a_matrix(small, choice, tmp_path):
    plain = load_stage(tmp_path / "c.safetensors", "stage_c", dtype="float32")
    # The MLPs have the largest, float32 while one is used; that of the last level, which reads a skip too, is float.
    shape, more = (1, 16, 6, 5), 4 * plain.module.up_blocks[0][0].channelwise[0].weight.numel()
    assert memory.sampling_bytes(small, shape, 8) - memory.sampling_bytes(plain, shape, 8) == more


# LoRA ----------------------------------------------------------------------------------------------------------


def steps(handle, name):
    """The distance of neighbours at each weight, where the merged model holds it."""
    scale, values = handle.module.get_buffer(name + "_scale")[:, None], handle.module.get_parameter(name)
    if values.dtype == torch.int8:
        return scale.expand(values.shape)
    exponent = torch.frexp(values.float().abs())[1] - 4
    return scale * 2.0 ** exponent.clamp(min=-9)


def test_a_lora_adds_what_it_learned(small):
    before = {name: weight_of(small.module, name) for name in (FUSED, OUT, LAST)}
    bits = small.module.get_parameter(FUSED).clone()
    lora = random_lora(small.module, [THIRD, OUT, LAST], alpha=0.5)
    merged, report = apply_lora(small, lora)
    assert len(report.matched) == 3 and merged.title == unmerged(merged).title == small.title
    change = deltas(lora.weights)
    for name, weight in before.items():
        expected = weight.double() + change[name]
        error = (weight_of(merged.module, name).double() - expected).abs()
        if name == LAST:
            assert error.max() < 1e-6
            continue
        assert merged.module.get_parameter(name).dtype == small.module.get_parameter(name).dtype
        assert (error <= steps(merged, name) * 1.001).all()
        assert error.mean() < 0.5 * change[name].abs().max()
    # What came in, and what no LoRA touches.
    assert torch.equal(small.module.get_parameter(FUSED), bits)
    other = "down_blocks.1.0.channelwise.0.weight"
    assert merged.module.get_parameter(other) is small.module.get_parameter(other)
    assert merged.size_in_bytes == small.size_in_bytes


def test_rows_that_a_lora_does_not_change_stay_to_the_bit(small):
    merged, _ = apply_lora(small, random_lora(small.module, [THIRD], alpha=30.0))
    c = len(weight_of(small.module, FUSED)) // 3
    before, after = weight_of(small.module, FUSED), weight_of(merged.module, FUSED)
    assert torch.equal(before[:c], after[:c]) and torch.equal(before[2 * c :], after[2 * c :])
    assert (before[c : 2 * c] != after[c : 2 * c]).float().mean() > 0.9


def test_changes_below_a_step_are_kept_on_average(small):
    before = weight_of(small.module, OUT)
    amount = 0.1 * small.module.get_buffer(OUT + "_scale").max().item()
    if small.weights == "float8":
        amount = 0.02 * before.abs().mean().item()
    size = len(before)
    lora = LoRA({OUT: LoRAWeights(torch.ones(1, size), torch.full((size, 1), amount), 1.0)})
    after = weight_of(apply_lora(small, lora)[0].module, OUT)
    assert (after == before).float().mean() > 0.3
    assert abs((after - before).mean().item() / amount - 1) < 0.35


def test_loras_merge_at_once_and_cancel(small):
    lora = random_lora(small.module, [THIRD, OUT], alpha=2.0)
    there, _ = apply_lora(small, lora, 1.0)
    back, _ = apply_lora(there, lora, -1.0)
    for name in (FUSED, OUT):
        assert torch.equal(weight_of(back.module, name), weight_of(small.module, name))
    assert relative(predicted(there.module), predicted(small.module)) > 0.01


def test_a_row_that_outgrows_its_scale_gets_another():
    values = torch.tensor([200.0, -3.5, 0.25, 127.0])
    whole = rounded(values, torch.int8, "a")
    assert whole.dtype == torch.int8 and whole[0] == 127 and whole[3] == 127
    assert whole[1].item() in (-4, -3) and whole[2].item() in (0, 1)
    many = rounded(torch.full((20_000,), 2.3), torch.int8, "a").float()
    assert set(many.tolist()) == {2.0, 3.0} and abs(many.mean().item() - 2.3) < 0.02
    exact = torch.arange(-127.0, 128.0).repeat(50)
    assert torch.equal(rounded(exact, torch.int8, "a").float(), exact)


# Hosts and training --------------------------------------------------------------------------------------------


def test_comfyui_is_lent_layers_that_fetch_their_weights(small, monkeypatch):
    """Its own layers are not needed: stand-ins show which it would be asked for."""
    from stable_cascade_nodes.nodes import comfyui_layers

    kinds = {kind: make for kind in ("Linear", "Conv2d", "LayerNorm") if (make := getattr(torch.nn, kind))}
    monkeypatch.setattr(comfyui_layers, "_operations", lambda: SimpleNamespace(**kinds))
    lent = comfyui_layers.rebuilt(small.module, comfyui_layers.comfyui_layer)
    layers = [layer for layer in lent.modules() if isinstance(layer, QuantizedLinear)]
    # The packed projections are layers of their own, which alone can stay in main memory.
    assert len(layers) == 3 * 2 + 3 * 3
    assert all(layer.comfy_cast_weights is False for layer in layers)
    ours = {id(weight) for weight in small.module.parameters()}
    assert {id(weight) for weight in lent.parameters()} == ours
    assert not any(hasattr(layer, "comfy_cast_weights") for layer in small.module.modules())
    torch.testing.assert_close(predicted(lent), predicted(small.module))


def test_they_are_streamed(small):
    """Their 8 bits are what is copied, and the result is to the bit that of weights that stay."""
    lane = LateLane()
    network = streamed(small.module, lane, least_bytes(small.module, 0), 0)
    assert torch.equal(predicted(network), predicted(small.module))
    plan = streaming_plan(network)
    assert plan.streamed > 0.5 * small.size_in_bytes and lane.copied() < 2 * small.size_in_bytes


def test_comfyuis_own_model_is_not_made_of_them(small):
    from stable_cascade_nodes.nodes.comfyui_bridge import to_model

    with pytest.raises(ValueError, match=rf"{small.weights} weights\) was given, expected float weights"):
        to_model(small)


def test_training_takes_float_weights(small):
    with pytest.raises(ValueError, match=rf"{small.weights} weights\) was given to train with, expected float weights"):
        Parts(given={"stage_c": small})


# What steers a Stage C, and pictures ---------------------------------------------------------------------------


def test_attachments_act_on_it(host, small_family, choice):
    """What a ControlNet adds and an IP-Adapter lets it read, on the same Stage C in both forms."""
    del host
    plain, small = (load_stage(small_family.paths["stage_c"], "stage_c", dtype=name) for name in ("float32", choice))
    from stable_cascade_nodes.cascade_ops.models import IPAdapter

    torch.manual_seed(0)
    adapter = IPAdapter(**IPAdapter.config_for(plain.module, 24)).eval().requires_grad_(False)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    adapter.check(small.module)
    results = {}
    for name, handle in (("plain", plain), ("small", small)):
        model, generator = handle.module, torch.Generator().manual_seed(1)
        text, pooled, picture, x = (
            torch.randn(shape, generator=generator) for shape in ((1, 5, 64), (1, 1, 32), (1, 1, 24), (1, 16, 6, 6))
        )
        control = [torch.randn(1, 64, 3, 3, generator=generator), None, None, None]
        with torch.no_grad():
            for what, decoupled, residuals in (
                ("none", [], None),
                ("adapter", [adapter.attention(picture, 1.0)], None),
                ("control", [], control),
            ):
                prepared = model.prepare(torch.tensor([0.5]), text, pooled, decoupled=decoupled)
                results[name, what] = model.step(x, prepared, 0, residuals)
    for what in ("none", "adapter", "control"):
        assert relative(results["small", what], results["plain", what]) < 0.1
    for what in ("adapter", "control"):
        effect = results["plain", what] - results["plain", "none"]
        assert relative(results["small", what] - results["small", "none"], effect) < 0.3


@pytest.fixture(scope="module")
def scenes():
    return measured_scenes(6, "test", 1)


def pictures_of(scenes, dtype):
    pipeline = CascadePipeline.load("tiny", device="cpu", dtype=dtype)
    made = [
        pipeline.generate(caption_full(scene), seed=number, steps_c=8, steps_b=3)[0]
        for number, scene in enumerate(scenes)
    ]
    return np.stack([np.asarray(picture) for picture in made])


@pytest.fixture(scope="module")
def exact(scenes):
    return pictures_of(scenes, "float32")


def test_pictures_follow_their_prompts(scenes, exact, choice):
    small = pictures_of(scenes, choice)
    right = shares(scenes, small)
    assert right["colour"] >= 5 / 6 and right["background"] >= 5 / 6 and right["position"] >= 4 / 6
    difference = np.abs(small.astype(float) - exact).mean() / 255
    assert 1e-4 < difference < {"int8 weights": 0.03, "float8 weights": 0.06}[choice]
    swapped = shares([*scenes[1:], scenes[0]], small)
    assert swapped["colour"] <= 3 / 6 < right["colour"]
