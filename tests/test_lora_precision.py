"""Several LoRAs on one model, and weights of few bits: nothing is lost, the order does not matter, off is off."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_kit import ATTENTION, deltas, handle_of, random_lora, small_stage_c, thirds

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora, write_lora
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, LoRAWeights, apply_lora
from stable_cascade_nodes.cascade_ops.adapters.rounding import rounded
from stable_cascade_nodes.cascade_ops.checkpoints.saving import save
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings

FUSED = ATTENTION + "in_proj_weight"
OUT = ATTENTION + "out_proj.weight"
CONV = "down_blocks.0.0.depthwise.weight"
FEW_BITS = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
# Distance of neighbours at 1, from the number of fraction bits that each type has.
STEPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float8_e4m3fn: 2**-3, torch.float8_e5m2: 2**-2}


def loras(model, count, dora=False):
    names = [FUSED, OUT, CONV, *thirds()]
    return [random_lora(model, names[i % 3 :], rank=1 + i, alpha=0.1, dora=dora, name=f"{i}") for i in range(count)]


def stacked(handle, applied):
    for lora, strength in applied:
        handle, _ = apply_lora(handle, lora, strength)
    return handle


def as_stored(handle, dtype):
    """The handle with its weights in `dtype`."""
    return handle_of(copy.deepcopy(handle.module).to(dtype))


def one_matrix(change, base, dtype):
    """What becomes of a weight of `dtype` under a change of rank 1, both `[n, n]`."""
    handle = handle_of(small_stage_c())
    size = len(base)
    handle.module.down_blocks[0][2].attention.attn.out_proj.weight = torch.nn.Parameter(base.to(dtype), False)
    lora = LoRA({OUT: LoRAWeights(torch.ones(1, size), torch.full((size, 1), change), 1.0)})
    return apply_lora(handle, lora)[0].module.get_parameter(OUT)


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(3)),
    strengths=st.lists(st.sampled_from([-1.0, 0.3, 1.0, 2.0]), min_size=3, max_size=3),
    dora=st.booleans(),
    dtype=st.sampled_from([torch.float32, *FEW_BITS]),
)
def test_the_order_changes_no_bit(order, strengths, dora, dtype):
    handle = as_stored(handle_of(small_stage_c()), dtype)
    applied = list(zip(loras(handle.module, 3, dora), strengths, strict=True))
    one, other = (stacked(handle, chosen).module for chosen in (applied, [applied[i] for i in order]))
    for name, weight in one.state_dict().items():
        assert weight.dtype == other.state_dict()[name].dtype
        assert torch.equal(weight.float(), other.state_dict()[name].float())


def test_several_add_up():
    handle = handle_of(small_stage_c())
    applied = list(zip(loras(handle.module, 3), (1.0, -0.5, 2.0), strict=True))
    result = stacked(handle, applied).module.state_dict()
    for name, before in handle.module.state_dict().items():
        expected = before.double() + sum(strength * deltas(lora.weights).get(name, 0) for lora, strength in applied)
        torch.testing.assert_close(result[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *FEW_BITS])
def test_what_cancels_out_leaves_no_trace(dtype):
    handle = as_stored(handle_of(small_stage_c()), dtype)
    lora = random_lora(handle.module, [FUSED, OUT, CONV], alpha=0.3)
    back = stacked(handle, [(lora, 0.8), (lora, -0.8)])
    changed = stacked(handle, [(lora, 0.8)]).module.state_dict()
    for name, before in handle.module.state_dict().items():
        assert torch.equal(back.module.state_dict()[name].float(), before.float())
        assert torch.equal(changed[name].float(), before.float()) == (name not in (FUSED, OUT, CONV))


@pytest.mark.parametrize("dtype", FEW_BITS)
def test_small_changes_are_kept(dtype):
    """A fiftieth of the distance between neighbours is nothing when it is rounded to the nearest."""
    base = torch.ones(512, 512)
    wanted = STEPS[dtype] / 50
    assert torch.equal((base + wanted).to(dtype), base.to(dtype))
    changed = one_matrix(wanted, base, dtype)
    assert changed.dtype == dtype
    assert (changed.double() - 1).mean().item() == pytest.approx(wanted, rel=0.05)
    assert set(changed.float().unique().tolist()) == {1.0, 1.0 + STEPS[dtype]}
    # In every part of it, and not the same ones everywhere.
    assert all((part.double() - 1).mean().item() == pytest.approx(wanted, rel=0.5) for part in changed.chunk(8))
    assert (changed[:256].float() != changed[256:].float()).any()


@pytest.mark.parametrize("dtype", FEW_BITS)
def test_small_changes_of_several_are_kept(dtype):
    """Also where each alone is rounded away: they are one change."""
    wanted = STEPS[dtype] / 60
    handle = handle_of(small_stage_c())
    weight = torch.nn.Parameter(torch.ones(256, 256).to(dtype), False)
    handle.module.down_blocks[0][2].attention.attn.out_proj.weight = weight
    lora = LoRA({OUT: LoRAWeights(torch.ones(1, 256), torch.full((256, 1), wanted), 1.0)})
    result = stacked(handle, [(lora, 1.0)] * 5).module.get_parameter(OUT)
    assert (result.double() - 1).mean().item() == pytest.approx(5 * wanted, rel=0.05)


@pytest.mark.parametrize("dtype", FEW_BITS)
def test_rounding_takes_a_neighbour(dtype):
    """Of the two that enclose a value, so none where the type holds it; over the whole range of the type."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.finfo(dtype)
    values = torch.randn(4000, generator=generator) * torch.logspace(-9, 4, 4000)
    values = values.clamp(-kind.max, kind.max)
    result = rounded(values, dtype, "a").float()
    nearest = values.to(dtype).float()
    held = torch.cat([nearest, torch.tensor([0.0, kind.max, -kind.max, kind.smallest_normal, kind.tiny])])
    assert torch.equal(rounded(held, dtype, "a").float(), held)
    # Rounded to the nearest, a value is at most half a step away; to a neighbour, less than a whole one.
    step = torch.maximum(values.abs() * STEPS[dtype], torch.tensor(kind.smallest_normal * STEPS[dtype]))
    assert ((result - values).abs() < step).all()
    assert (result != nearest).float().mean() > 0.05
    beyond = torch.tensor([2.0, -2.0]) * kind.max if dtype != torch.bfloat16 else torch.tensor([3.4e38, -3.4e38])
    assert torch.equal(rounded(beyond, dtype, "a").float(), torch.tensor([kind.max, -kind.max]))


def test_rounding_is_the_same_each_time():
    values = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    first, again, other = (rounded(values, torch.bfloat16, name) for name in "aab")
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    assert torch.equal(rounded(values, torch.bfloat16, "a"), first)
    assert torch.equal(rounded(values, torch.float32, "a"), values)


def test_large_weights_are_rounded_in_parts(monkeypatch):
    values = torch.rand(70, 60, generator=torch.Generator().manual_seed(1))
    whole = rounded(values, torch.bfloat16, "a")
    monkeypatch.setattr("stable_cascade_nodes.cascade_ops.adapters.rounding._CHUNK", 999)
    assert torch.equal(rounded(values, torch.bfloat16, "a"), whole)


def test_an_eight_bit_file_takes_a_lora(tmp_path):
    """Its weights are bfloat16 or more once they are loaded, so what it adds is not cut to eight bits."""
    from lora_kit import CONFIG

    model = small_stage_c()
    path = save(model, tmp_path / "c.safetensors", stage="stage_c", config=CONFIG, dtype=torch.float8_e4m3fn)
    lora = read_lora(write_lora(random_lora(model, [FUSED, OUT], alpha=0.01), tmp_path / "l.safetensors"))
    for dtype in ("float32", "bfloat16"):
        handle = load_stage(path, "stage_c", dtype=dtype)
        result = apply_lora(handle, lora)[0].module.get_parameter(OUT)
        assert result.dtype == getattr(torch, dtype)
        before = model.get_parameter(OUT).to(torch.float8_e4m3fn).double()
        torch.testing.assert_close(
            result.double(), before + deltas(lora.weights)[OUT], rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-4
        )


def test_weights_are_merged_when_they_are_used(monkeypatch):
    """Once, and not for a handle that another LoRA goes on."""
    from stable_cascade_nodes.cascade_ops.adapters import merging

    merged = []
    real = merging._merged
    monkeypatch.setattr(merging, "_merged", lambda plain, applied: merged.append(len(applied)) or real(plain, applied))
    handle = handle_of(small_stage_c())
    first, second = loras(handle.module, 2)
    once, _ = apply_lora(handle, first)
    twice, _ = apply_lora(once, second)
    assert merged == []
    module = twice.module
    assert twice.module is module and twice.network is module and merged == [2]
    # What no LoRA touches is the same memory in all of them.
    shared = [name for name, weight in module.named_parameters() if weight is handle.module.get_parameter(name)]
    assert set(dict(module.named_parameters())) - set(shared) == {FUSED, OUT, CONV}


def test_the_untouched_model_stays_bit_for_bit():
    handle = handle_of(small_stage_c())
    before = copy.deepcopy(handle.module.state_dict())
    for lora, strength in itertools.product(loras(handle.module, 2), (1.0, 0.0, -3.0)):
        assert apply_lora(handle, lora, strength)[0].module is not None
    assert all(torch.equal(weight, before[name]) for name, weight in handle.module.state_dict().items())
    assert apply_lora(handle, lora, 0.0)[0].module is handle.module


def test_another_device_gets_a_model_of_its_own():
    handle = handle_of(small_stage_c())
    first, second = loras(handle.module, 2)
    here, _ = apply_lora(handle, first)
    assert here.to("cpu") is here
    there = here.to("meta")
    assert there.device.type == "meta" and here.device.type == "cpu"
    assert apply_lora(there, second)[0].module.get_parameter(FUSED).is_meta


def test_sampling_defaults_of_a_lora(tmp_path):
    handle = handle_of(small_stage_c(), guidance=4.0, shift=2.0)
    lora = random_lora(handle.module, [OUT])
    for dialect in ("comfyui", "reference"):
        path = tmp_path / f"{dialect}.safetensors"
        found = read_lora(
            write_lora(lora, path, dialect, base=handle.module, defaults={"guidance": 1.0}), handle.module
        )
        changed, _ = apply_lora(handle, found, -0.2)
        assert changed.info.defaults == {"guidance": 1.0, "shift": 2.0} and dict(found.defaults) == {"guidance": 1.0}
        assert apply_lora(handle, found, 0.0)[0].info.defaults == {"guidance": 4.0, "shift": 2.0}
    assert handle.info.defaults == {"guidance": 4.0, "shift": 2.0}
    again = read_lora(write_lora(found, tmp_path / "again.safetensors"))
    assert again.defaults == found.defaults
    own = read_lora(write_lora(lora, tmp_path / "own.safetensors", defaults={"sampler": "lcm"}))
    assert SamplingSettings().for_model(apply_lora(handle, own)[0]).sampler == "lcm"
    for wrong in ({"speed": 1.0}, {"guidance": "high"}, {"guidance": 0.0}, {"sampler": "fast"}, {"sampler": 2.0}):
        with pytest.raises(ValueError, match="expected positive numbers for some of width, height, guidance"):
            write_lora(lora, tmp_path / "b.safetensors", defaults=wrong)
    assert not (tmp_path / "b.safetensors").exists()
