"""Stage C with the stream of its last level divided: the same numbers, and inside float16's range."""

import copy

import pytest
import torch
from conftest import randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_kit import handle_of, random_change, random_lora, small_stage_c

from stable_cascade_nodes.benchmarks.half_precision import conditions, errors, growing_stage_c, peak_of_stream
from stable_cascade_nodes.cascade_ops import float16
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, apply_lora
from stable_cascade_nodes.cascade_ops.models import DecoupledAttention, StageC
from stable_cascade_nodes.cascade_ops.models.layers import AttnBlock, ResBlock

SMALL = {"c_cond": 16, "c_clip_text": 8, "c_clip_text_pooled": 8, "c_clip_img": 8, "dropout": 0.0}


def stage_c(letters="CTA", groups=2, repeats=1, switch=False, t_conds=("sca", "crp"), seed=0):
    """A small Stage C; `letters`, `groups` and `repeats` are those of its last level."""
    return randomised(
        StageC(
            **SMALL,
            c_hidden=(16, 24),
            nhead=(2, 2),
            blocks=((1, 1), (1, groups)),
            block_repeat=((1, 1), (1, repeats)),
            level_config=(letters, "CTA"),
            switch_level=(switch,),
            t_conds=t_conds,
        ),
        seed,
        1.0,
    )


def steered(model, seed=0):
    """Everything that can reach a step: both kinds of embeddings, size conditions, controls, an IP-Adapter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    key_values = tuple(draw(1, 3, 2 * block.attention["attn"].out_proj.in_features) for block in attentions(model))
    return {
        "x": draw(2, 16, 8, 6),
        "r": torch.tensor([0.3, 0.8]),
        "clip_text": draw(2, 4, 8),
        "clip_text_pooled": draw(2, 1, 8),
        "clip_img": draw(2, 1, 8),
        **{name: torch.tensor([0.2, 0.9]) for name in model.t_conds},
        "control": [draw(2, width, 5, 4) for width in widths(model)],
        "decoupled": [DecoupledAttention(key_values, (0.7,) * len(key_values))],
    }


def attentions(model):
    return model.blocks_of(AttnBlock)


def widths(model):
    """Channels at each residual block, in the order in which a pass runs them, repeats too."""
    found = []
    for side, repeats in ((model.down_blocks, model.down_repeat_mappers), (model.up_blocks, model.up_repeat_mappers)):
        for blocks, mappers in zip(side, repeats, strict=True):
            level = [block.depthwise.in_channels for block in blocks if isinstance(block, ResBlock)]
            found += level * (len(mappers) + 1)
    return found


@settings(max_examples=25, deadline=None)
@given(
    letters=st.sampled_from(["CTA", "CT", "CTAF", "CF", "TACF"]),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 2),
    switch=st.booleans(),
    t_conds=st.sampled_from([(), ("sca",), ("sca", "crp")]),
    power=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_the_same_to_the_last_bit(letters, groups, repeats, switch, t_conds, power, seed):
    model = stage_c(letters, groups, repeats, switch, t_conds, seed)
    given_to_it = steered(model, seed)
    with torch.no_grad():
        assert torch.equal(float16.rescaled(model, 2.0**power)(**given_to_it), model(**given_to_it))


def test_each_thing_that_reaches_the_last_level_is_felt():
    """The test above would not see an input without effect."""
    model = stage_c()
    full = steered(model)
    with torch.no_grad():
        whole = model(**full)
        for name in ("sca", "crp", "decoupled"):
            assert not torch.equal(model(**full | {name: None if name != "decoupled" else ()}), whole)
        for block in range(len(full["control"])):
            fewer = [None if place == block else each for place, each in enumerate(full["control"])]
            assert not torch.equal(model(**full | {"control": fewer}), whole)


def test_the_streams_of_the_last_level_are_divided_and_others_are_not():
    model = stage_c()
    seen = {}

    def watch(network, key):
        for name in ("down_blocks", "up_blocks"):
            for level, blocks in enumerate(getattr(network, name)):
                for number, block in enumerate(blocks):
                    place = (name, level, number)
                    block.register_forward_hook(
                        lambda block, taken, out, place=place: seen.setdefault(place, {}).update({key: out.clone()})
                    )

    changed = float16.rescaled(model, 8.0)
    watch(model, "plain")
    watch(changed, "divided")
    with torch.no_grad():
        model(**steered(model))
        changed(**steered(model))
    for (name, level, _), out in seen.items():
        factor = 8 if (name, level) == ("up_blocks", 1) else 1
        assert torch.equal(out["divided"] * factor, out["plain"])


def test_the_model_that_came_in_stays_and_other_weights_are_shared():
    model = stage_c()
    before = copy.deepcopy(model.state_dict())
    changed = float16.rescaled(model, 4.0)
    assert float16.scale_of(model) == 1 and float16.scale_of(changed) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    divided = float16.divided(model)
    for (name, ours), theirs in zip(changed.named_parameters(), model.parameters(), strict=True):
        assert (ours.data_ptr() == theirs.data_ptr()) == (name not in divided)
    assert all(name.startswith(("up_blocks.1.", "up_upscalers.0.")) for name in divided)


@pytest.mark.parametrize("scale", [0.5, 3.0, 48.0, 0.0, -2.0])
def test_other_scales_than_powers_of_two_are_refused(scale):
    with pytest.raises(ValueError, match="expected a power of two"):
        float16.rescaled(stage_c(), scale)


def test_what_cannot_be_rescaled_is_refused():
    one_level = StageC(
        **SMALL, c_hidden=(16,), nhead=(2,), blocks=((1,), (1,)), block_repeat=None, level_config=("CTA",),
        switch_level=(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="has 1 level"):
        float16.rescaled(one_level)
    with pytest.raises(ValueError, match=r"rescaled by 64\.0 already"):
        float16.rescaled(float16.rescaled(stage_c()))


@pytest.mark.parametrize(("channels", "largest", "usual"), [(0, 0.006, 0.0015), (3, 0.1, 0.006)])
def test_a_stream_beyond_float16_agrees_with_float32(channels, largest, usual):
    """The errors that docs/performance/float16.md states, over the largest value of the prediction."""
    model = growing_stage_c(192, 1e6, channels)
    inputs = conditions(model)
    assert peak_of_stream(model, inputs) > 1e5
    with torch.no_grad():
        exact = model(**inputs)
        assert not copy.deepcopy(model).half()(**inputs).isfinite().all()
        half = float16.rescaled(model, dtype=torch.float16)(**inputs)
        in_bfloat16 = errors(copy.deepcopy(model).bfloat16()(**inputs), exact)
    assert half.dtype == torch.float16
    found = errors(half, exact)
    assert found[0] < largest and found[1] < usual
    assert found[0] < in_bfloat16[0] and found[1] < in_bfloat16[1]


def lora_of_everything(model, dora=False):
    """Changes of whole weights, of thirds and of weights that only partly belong to the stream."""
    names = [name for name, weight in model.named_parameters() if weight.ndim > 1 and "gamma" not in name]
    names = [name for name in names if "beta" not in name and "in_proj" not in name]
    if dora:
        return random_lora(model, [name for name in names if "depthwise" not in name], dora=True, name="d")
    weights = {name: random_change(tuple(model.get_parameter(name).shape), seed=i) for i, name in enumerate(names)}
    return LoRA(weights, name="l")


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_and_then_rescaled_is_rescaled_and_then_the_lora(dora):
    plain = small_stage_c()
    lora = lora_of_everything(plain, dora)
    first = float16.rescaled(apply_lora(handle_of(plain), lora, 0.7)[0].module, 16.0)
    changed, report = apply_lora(handle_of(float16.rescaled(plain, 16.0)), lora, 0.7)
    assert not report.unmatched and float16.scale_of(changed.module) == 16
    for (name, ours), theirs in zip(changed.module.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_lora_on_rescaled_float16_is_within_one_rounding():
    plain = small_stage_c()
    lora = lora_of_everything(plain)
    exact = dict(apply_lora(handle_of(plain), lora)[0].module.named_parameters())
    changed = apply_lora(handle_of(float16.rescaled(plain, dtype=torch.float16)), lora)[0].module
    divided = float16.divided(plain)
    for name, weight in changed.named_parameters():
        back = float16.scaled_rows(weight, divided.get(name), 64.0)
        # Rounded as a weight, and with the change up or down; below the normal numbers the steps are of one size.
        allowed = 2**-11 * plain.get_parameter(name).abs() + 2**-10 * exact[name].abs() + 64 * 2**-23
        assert ((back - exact[name]).abs() <= allowed).all(), name
