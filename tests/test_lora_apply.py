"""A LoRA merged into a model: the published result, the right weights, nothing else."""

import copy

import pytest
import torch
from golden import DATA, build, read_golden, relative_error
from lora_kit import ATTENTION, deltas, handle_of, random_change, random_lora, small_stage_c, thirds

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, LoRAWeights, apply_lora
from stable_cascade_nodes.cascade_ops.models import StageC

FUSED = ATTENTION + "in_proj_weight"
OUT = ATTENTION + "out_proj.weight"
TEXT = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture
def stage_c():
    return handle_of(small_stage_c())


def weight(handle, name=OUT):
    return handle.network.state_dict()[name]


def test_the_reference_gives_the_same_picture():
    tensors, metadata = read_golden("lora_reference_output")
    handle = handle_of(build(StageC, metadata))
    lora = read_lora(DATA / "golden" / "lora_reference_format.safetensors", handle.module)
    changed, report = apply_lora(handle, lora)
    assert len(report.matched) == 20 and not report.unmatched
    inputs = {name: tensors[name] for name in ("x", "r", "clip_text", "clip_text_pooled", "clip_img")}
    with torch.no_grad():
        assert relative_error(changed.module(**inputs), tensors["output"]) < 1e-4
        assert relative_error(handle.module(**inputs), tensors["output_without"]) < 1e-4
    assert relative_error(tensors["output_without"], tensors["output"]) > 0.01


@pytest.mark.parametrize("strength", [1.0, 0.4, -1.0])
def test_weights_change_by_the_delta(stage_c, strength):
    names = [FUSED, OUT, thirds()[1], "down_blocks.0.0.depthwise.weight", "embedding.1.weight"]
    lora = random_lora(stage_c.module, names, rank=3, alpha=0.7)
    changed, report = apply_lora(stage_c, lora, strength)
    assert set(report.matched) == set(names)
    expected = deltas(lora.weights)
    for name, before in stage_c.module.state_dict().items():
        after = changed.module.state_dict()[name]
        torch.testing.assert_close(
            after.double(), before.double() + strength * expected.get(name, 0), rtol=1e-5, atol=1e-6
        )


def test_what_came_in_stays_and_the_rest_is_shared(stage_c):
    before = copy.deepcopy(stage_c.module.state_dict())
    changed, _ = apply_lora(stage_c, random_lora(stage_c.module, [FUSED]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage_c.module.state_dict().items())
    ours, theirs = dict(changed.module.named_parameters()), dict(stage_c.module.named_parameters())
    assert [name for name in ours if ours[name] is not theirs[name]] == [FUSED]
    assert not any(parameter.requires_grad for parameter in (ours[FUSED],))
    assert changed.module.down_blocks[0][0] is not stage_c.module.down_blocks[0][0]


def test_strength_zero_changes_no_bit(stage_c):
    changed, report = apply_lora(stage_c, random_lora(stage_c.module, [FUSED, OUT], dora=True), 0.0)
    assert len(report.matched) == 2
    assert changed is stage_c


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_gives_columns_their_learned_size(stage_c, strength):
    lora = random_lora(stage_c.module, [OUT, FUSED], dora=True)
    changed, _ = apply_lora(stage_c, lora, strength)
    for name, parts in ((OUT, 1), (FUSED, 3)):
        before = weight(stage_c, name).double()
        full = (before + deltas(lora.weights)[name]).reshape(parts, -1, 8)
        unit = full / full.square().sum(dim=1, keepdim=True).sqrt()
        goal = (unit * lora.weights[name].dora_scale[:, None].double()).reshape(before.shape)
        torch.testing.assert_close(
            weight(changed, name).double(), before + strength * (goal - before), rtol=1e-5, atol=1e-5
        )


def test_dora_by_outputs_and_by_places_of_a_kernel(stage_c):
    conv = "down_blocks.0.0.depthwise.weight"
    rows = random_change((8, 8), dora_shape=(8, 1))
    kernel = random_change((8, 1, 3, 3), dora_shape=(1, 1, 1, 1))
    changed, _ = apply_lora(stage_c, LoRA({OUT: rows, conv: kernel}))
    torch.testing.assert_close(weight(changed).norm(dim=1), rows.dora_scale[:, 0])
    torch.testing.assert_close(weight(changed, conv).norm(), kernel.dora_scale.squeeze())
    with pytest.raises(ValueError, match=r"shape \[2, 8\], expected \[8, 1\] or \[1, 8\]"):
        random_change((8, 8), dora_shape=(2, 8))


def test_the_report_counts(stage_c):
    weights = dict(random_lora(stage_c.module, [FUSED, OUT]).weights)
    weights["down_blocks.7.2.kv_mapper.1.weight"] = random_change((8, 8))
    weights["clf.1.weight"] = random_change((3, 3))
    weights[TEXT] = random_change((8, 8))
    _, report = apply_lora(stage_c, LoRA(weights, unread=("strange",)))
    assert report.matched == (FUSED, OUT) and report.skipped == (TEXT,)
    assert report.unmatched["down_blocks.7.2.kv_mapper.1.weight"] == "there is no such weight"
    assert report.unmatched["clf.1.weight"] == "it is of shape [3, 3], the weight of [16, 8, 1, 1]"
    text = report.describe()
    assert "2 of 4 changes applied" in text and "1 are for the text encoder" in text and "'strange'" in text


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (
            {OUT: random_change((9, 9))},
            r"l.safetensors fits nothing of Stage C custom.*\[9, 9\], the weight of \[8, 8\]",
        ),
        ({TEXT: random_change((9, 9))}, "holds 1 changes of the text encoder and none for Stage C custom"),
        ({}, "holds no change that Stable Cascade knows"),
    ],
)
def test_a_lora_that_fits_nothing_is_refused(stage_c, weights, problem):
    with pytest.raises(ValueError, match=problem):
        apply_lora(stage_c, LoRA(weights, name="l.safetensors"), 0.0)


def test_the_text_encoder_takes_one_too(handles):
    handle = handles["text_encoder"]
    before = handle.network.state_dict()[TEXT].clone()
    change = random_change(tuple(before.shape))
    changed, report = apply_lora(handle, LoRA({TEXT: change, OUT: random_change((8, 8))}), 0.5)
    assert report.matched == (TEXT,) and report.skipped == (OUT,)
    torch.testing.assert_close(changed.network.state_dict()[TEXT], before + 0.5 * change.delta())
    assert torch.equal(handle.network.state_dict()[TEXT], before)
    old, new = handle.module.encode("a cat"), changed.module.encode("a cat")
    assert (old.hidden - new.hidden).abs().max() > 1e-3


def test_a_lora_cannot_be_changed():
    source = {OUT: random_change((8, 8))}
    lora = LoRA(source)
    source.clear()
    assert OUT in lora.weights
    with pytest.raises(TypeError):
        lora.weights[FUSED] = lora.weights[OUT]
    with pytest.raises(AttributeError):
        lora.weights[OUT].alpha = 2.0
    with pytest.raises(ValueError, match=r"down \[2, 8\] and up \[8, 3\]"):
        LoRAWeights(torch.zeros(2, 8), torch.zeros(8, 3), 1.0)
