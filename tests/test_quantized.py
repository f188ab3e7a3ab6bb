"""Weights of 8 bits: the values, the layers, and which weights have them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_kit import FORMATS, FUSED, LAST, OUT, inputs, predicted, relative, saved_stage_c
from torch import nn

from stable_cascade_nodes.benchmarks.quantized_weights import error, groups, memory_rows, rounded
from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.checkpoints import load
from stable_cascade_nodes.cascade_ops.models.layers import Attention
from stable_cascade_nodes.cascade_ops.quantized import (
    QuantizedAttention,
    QuantizedLinear,
    dequantized,
    is_quantized,
    matrices,
    quantized,
    weight_of,
)

MANIFESTS = Path(__file__).parent / "data/manifests"
KINDS = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
# Half of the last bit of a number between 1 and 2, and the distance of the smallest numbers.
FLOAT8 = {torch.float8_e4m3fn: (2**-4, 2**-9), torch.float8_e5m2: (2**-3, 2**-16)}


def bound(weight, scale, dtype):
    """The largest error that rounding to the nearest makes, float64."""
    step = scale.double()[:, None]
    if dtype == torch.int8:
        return step * (0.5 + 2**-16)  # a quotient is rounded before it is rounded to a whole number
    relative, least = FLOAT8[dtype]
    return torch.maximum(weight.abs().double() * relative, step * least / 2)


@st.composite
def rows(draw):
    """A matrix with rows of sizes from 1e-30 to 1e30, some of them zero or of one value."""
    seed, height, width = draw(st.integers(0, 2**31)), draw(st.integers(1, 6)), draw(st.integers(1, 40))
    weight = torch.randn(height, width, generator=torch.Generator().manual_seed(seed))
    sizes = draw(
        st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.02, 1.0, 300.0, 1e30]), min_size=height, max_size=height)
    )
    weight *= torch.tensor(sizes)[:, None]
    if draw(st.booleans()):
        weight[0] = weight[0, 0]
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@settings(max_examples=80, deadline=None)
@given(weight=rows(), dtype=st.sampled_from(KINDS))
def test_no_value_is_farther_off_than_half_a_step_of_its_row(weight, dtype):
    values, scale = quantized(weight, dtype)
    assert values.dtype == dtype and values.shape == weight.shape and scale.shape == (len(weight),)
    result = values.double() * scale.double()[:, None]
    assert ((result - weight.double()).abs() <= bound(weight, scale, dtype)).all()
    assert torch.equal(dequantized(values, scale, torch.float32).double(), result)


@settings(max_examples=40, deadline=None)
@given(weight=rows(), dtype=st.sampled_from(KINDS))
def test_the_step_is_as_small_as_the_largest_value_lets_it_be(weight, dtype):
    _, scale = quantized(weight, dtype)
    largest = weight.abs().amax(dim=1).double()
    top, spare = (127.0, 1 + 2**-6) if dtype == torch.int8 else (torch.finfo(dtype).max, 2.0)
    assert (scale.double() * top >= largest * (1 - 2**-20)).all()
    some = largest > 1e-28  # the scale has a smallest value
    assert (scale.double() * top <= largest * spare)[some].all()


def test_rows_of_zeros_stay_zeros():
    for dtype in KINDS:
        values, scale = quantized(torch.zeros(3, 4), dtype)
        for compute in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantized(values, scale, compute), torch.zeros(3, 4, dtype=compute))
        # A scale that can be divided by, on devices too that know no smaller numbers.
        for size in (0.0, 1e-42):
            assert (quantized(torch.full((2, 3), size), dtype)[1] >= 2.0**-126).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_a_scale_may_lie_below_the_range_of_float16(dtype):
    weight = 3e-6 * torch.randn(5, 9, generator=torch.Generator().manual_seed(6))
    wide, narrow = (dequantized(*quantized(weight, dtype), compute) for compute in (torch.float32, torch.float16))
    assert torch.equal(narrow, wide.half()) and narrow.count_nonzero() > 30


def test_large_matrices_are_rounded_in_parts(monkeypatch):
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    whole = quantized(weight, torch.int8)
    monkeypatch.setattr("stable_cascade_nodes.cascade_ops.quantized._CHUNK", 100)
    assert all(torch.equal(*pair) for pair in zip(quantized(weight, torch.int8), whole, strict=True))


@pytest.mark.parametrize("dtype", KINDS)
def test_scales_are_exact_in_bfloat16(dtype):
    _, scale = quantized(torch.randn(500, 8, generator=torch.Generator().manual_seed(2)), dtype)
    assert torch.equal(scale.bfloat16().float(), scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", KINDS)
def test_no_finite_number_is_refused(value, dtype):
    weight = torch.ones(4, 4)
    weight[2, 1] = value
    with pytest.raises(ValueError, match="no finite numbers"):
        quantized(weight, dtype)


def layer_of(dtype, rows=24, columns=16):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    bias = nn.Parameter(torch.randn(rows, generator=torch.Generator().manual_seed(4)))
    return QuantizedLinear(*quantized(weight, dtype), bias)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", KINDS)
def test_a_layer_multiplies_with_the_dequantised_weight(dtype, compute):
    layer = layer_of(dtype)
    x = torch.randn(3, 70, 16, generator=torch.Generator().manual_seed(5)).to(compute)
    found = layer(x)
    weight = layer.weight.float() * layer.weight_scale[:, None]
    expected = F.linear(x, weight.to(compute), layer.bias.detach().to(compute))
    assert found.dtype == compute and found.shape == (3, 70, 24)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", KINDS)
def test_attention_projects_with_the_dequantised_thirds(dtype):
    plain = Attention(16, 2).eval().requires_grad_(False)
    plain.in_proj_bias.data = torch.randn(48)
    values, scale = quantized(plain.in_proj_weight, dtype)
    layer = QuantizedAttention(plain, values, scale).eval()
    plain.in_proj_weight.data = values.float() * scale[:, None]
    tokens, condition = torch.randn(2, 9, 16), torch.randn(2, 5, 32)
    with torch.no_grad():
        for own in (True, False):
            torch.testing.assert_close(layer(tokens, condition, own), plain(tokens, condition, own))
        torch.testing.assert_close(layer.project(tokens, slice(1, 3)), plain.project(tokens, slice(1, 3)))
        torch.testing.assert_close(layer.packed()(tokens), plain.project(tokens, slice(0, 3)))
    assert layer.packed().weight is layer.in_proj_weight


def test_a_layer_fetches_its_weights_to_where_its_input_is(monkeypatch):
    """And it fetches them in 8 bits."""
    seen = []

    def spied(values, scale, dtype):
        seen.append((values.device.type, scale.device.type, values.dtype))
        return dequantized(values, scale, dtype)

    monkeypatch.setattr("stable_cascade_nodes.cascade_ops.quantized.dequantized", spied)
    layer = layer_of(torch.int8)
    assert layer(torch.empty(2, 16, device="meta")).is_meta and not layer.weight.is_meta
    assert seen == [("meta", "meta", torch.int8)]


@pytest.mark.parametrize("choice", FORMATS)
def test_a_stage_c_predicts_nearly_the_same(tmp_path, choice):
    path = saved_stage_c(tmp_path / "c.safetensors")
    exact, _ = load(path, "stage_c")
    small, _ = load(path, "stage_c", eight_bits=FORMATS[choice])
    error = relative(predicted(small), predicted(exact))
    assert 1e-5 < error < {"int8 weights": 0.02, "float8 weights": 0.06}[choice]
    # As if the file had held the rounded weights.
    for name in matrices("stage_c", dict(exact.named_parameters())):
        exact.get_parameter(name).copy_(weight_of(small, name))
    torch.testing.assert_close(predicted(small), predicted(exact), rtol=1e-4, atol=1e-5)


def test_it_predicts_with_gradients_on_too(tmp_path):
    """Blocks take another way there."""
    small, _ = load(saved_stage_c(tmp_path / "c.safetensors"), "stage_c", eight_bits=torch.int8)
    torch.testing.assert_close(small(**inputs()), predicted(small), rtol=1e-4, atol=1e-5)


def test_which_weights_have_8_bits(tmp_path):
    small, _ = load(saved_stage_c(tmp_path / "c.safetensors"), "stage_c", eight_bits=torch.int8)
    weights = dict(small.named_parameters())
    found = {name for name, weight in weights.items() if weight.dtype == torch.int8}
    assert {FUSED, OUT, "up_blocks.0.0.channelwise.4.weight", "down_blocks.1.2.kv_mapper.1.weight"} <= found
    assert LAST in weights and not any(name.startswith("up_blocks.1.") for name in found)
    kept = ("clf", "embedding", "clip_", "mapper.weight", "depthwise", "gamma", "bias", "downscalers", "upscalers")
    assert not [name for name in found if any(word in name.replace("kv_mapper", "") for word in kept)]
    assert {weight.dtype for name, weight in weights.items() if name not in found} == {torch.float32}
    assert is_quantized(small) and not is_quantized(load(tmp_path / "c.safetensors", "stage_c")[0])


# The last level of Stage C of 3.6B, 8 of 64 groups of blocks, has 12.6% of it.
@pytest.mark.parametrize(
    ("stage", "manifest", "least"),
    [
        ("stage_c", "stage_c_3.6b", 0.83),
        ("stage_c", "stage_c_1b_lite", 0.82),
        ("stage_b", "stage_b_1.5b", 0.94),
        ("stage_b", "stage_b_700m_lite", 0.93),
    ],
)
def test_most_of_the_published_models(stage, manifest, least):
    shapes = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    count = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    found = matrices(stage, count)
    assert least < sum(count[name] for name in found) / sum(count.values()) < 0.99
    assert stage == "stage_b" or not [name for name in found if name.startswith("up_blocks.1.")]


def test_the_table_of_memory_is_of_the_published_models():
    sizes = {row[0]: row for row in memory_rows()}
    for title, manifest in (("Stage C 3.6B", "stage_c_3.6b"), ("Stage B 700M lite", "stage_b_700m_lite")):
        shapes = json.loads((MANIFESTS / f"{manifest}.json").read_text())
        count = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert sizes[title][1] == f"{count:,}" and sizes[title][3] == f"{count * 4e-9:.2f}"
        eight, half = (float(cell) for cell in (sizes[title][5], sizes[title][4]))
        assert 0.5 * half < eight < 0.6 * half


def test_only_what_a_line_of_the_table_names_is_rounded():
    model = load(bundled("stage_c").path, "stage_c", dtype=torch.float32)[0]
    names = groups("stage_c", dict(model.named_parameters()))["output layer alone"]
    changed = rounded(model, names, torch.int8)
    assert names == ["clf.1.weight"]
    different = [n for n, weight in model.named_parameters() if not torch.equal(weight, changed.get_parameter(n))]
    assert different == names and 0 < error("stage_c", model, changed) < 0.01 and error("stage_c", model, model) == 0
