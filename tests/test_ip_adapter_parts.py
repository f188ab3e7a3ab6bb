"""Where an IP-Adapter acts: masks over the picture, groups of attention blocks, and several pictures of a batch."""

import pytest
import torch
from attachment_kit import IMAGE_WIDTH, differ, near, noise
from conftest import DEFAULTS_C
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops.attached import fitted_mask
from stable_cascade_nodes.cascade_ops.attachments import (
    COMBINE,
    AppliedIPAdapter,
    apply_ip_adapter,
    attention_groups,
    combined,
)
from stable_cascade_nodes.cascade_ops.diffusion import Guidance, draw_noise, image_generators, sample
from stable_cascade_nodes.cascade_ops.models import StageC
from stable_cascade_nodes.cascade_ops.sizes import stage_c_size

SIZE = (512, 256)
WHOLE = torch.ones(1, 256, 512)


def pictures(seed=0, batch=1, count=1):
    return noise(batch, count, IMAGE_WIDTH, seed=seed)


@pytest.fixture(scope="module")
def stage_c(handles):
    return handles["stage_c"]


def left_half(rows=256, columns=512):
    mask = torch.zeros(1, rows, columns)
    mask[:, :, : columns // 2] = 1
    return mask


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("negative_length", [77, 40])
def test_masks_of_ones_and_zeros_are_none_and_off_to_the_last_bit(
    stage_c, adapter, prompts, sampled, guidance, negative_length
):
    """In one pass for both halves, and where their prompts differ in length, in one for each."""
    prompts = [prompts[0], prompts[1]._replace(hidden=prompts[1].hidden[:, :negative_length])]

    def run(handle, batch=1):
        return sampled(handle, batch, SIZE, prompts=prompts, guidance=guidance)

    def masked(mask, weight=0.7):
        return apply_ip_adapter(stage_c, adapter, pictures(), weight, mask=mask)

    plain, whole = run(stage_c), run(apply_ip_adapter(stage_c, adapter, pictures(), 0.7))
    assert torch.equal(run(masked(WHOLE)), whole)
    assert torch.equal(run(masked(torch.ones(8, 16))), whole)
    assert torch.equal(run(masked(torch.zeros(1, 6, 12))), plain)
    half = run(masked(left_half()))
    differ(half, plain)
    differ(half, whole)
    near(run(masked(WHOLE / 2)), run(apply_ip_adapter(stage_c, adapter, pictures(), 0.35)))

    both = run(masked(torch.cat([WHOLE, WHOLE * 0])), batch=2)
    assert torch.equal(both[:1], run(apply_ip_adapter(stage_c, adapter, pictures(), 0.7), batch=2)[:1])
    assert torch.equal(both[1:], run(stage_c, batch=2)[1:])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("negative_length", [77, 40])
def test_a_masked_run_equals_the_models_own_forward(stage_c, adapter, prompts, sampled, guidance, negative_length):
    """An independent denoiser with masks that were averaged by hand, one per picture, in some of the blocks."""
    model, embeddings = stage_c.module, pictures(batch=2)
    prompts = [prompts[0], prompts[1]._replace(hidden=prompts[1].hidden[:, :negative_length])]
    mask = noise(2, 60, 120)
    small = mask.reshape(2, 6, 10, 12, 10).mean(dim=(2, 4))

    class Forward:
        def prepare(self, noise_cond, shape, guided):
            def half(x, index, text, seen):
                level = noise_cond[index].expand(2)
                image = torch.zeros(2, 1, IMAGE_WIDTH)
                decoupled = [adapter.module.attention(seen, [0.8, 0.0, 0.4, 0.8], small)]
                hidden, pooled = text.hidden.expand(2, -1, -1), text.pooled[:, None].expand(2, -1, -1)
                return model(x, level, hidden, pooled, image, decoupled=decoupled)

            def predict(x, index, guided):
                cond = half(x, index, prompts[0], embeddings)
                return cond, half(x, index, prompts[1], torch.zeros_like(embeddings)) if guided else None

            return predict

    generators = image_generators(3, 2)
    start = draw_noise(generators, (2, 16, 6, 12), torch.device("cpu"))
    expected = sample(
        Forward(), start, steps=4, shift=DEFAULTS_C["shift"], guidance=Guidance(guidance), generators=generators
    )
    applied = apply_ip_adapter(stage_c, adapter, embeddings, 0.8, mask=mask, groups=(1, 0, 0.5, 1))
    near(sampled(applied, 2, SIZE, prompts=prompts, guidance=guidance), expected.latent)


def test_two_pictures_side_by_side_act_where_their_masks_are(stage_c, adapter, sampled):
    """Of two adapters in two halves, each changes mostly its own."""

    def run(*parts):
        handle = stage_c
        for seed, mask in parts:
            handle = apply_ip_adapter(handle, adapter, pictures(seed), mask=mask)
        return sampled(handle, 1, SIZE)

    left, right = left_half(), 1 - left_half()
    changed = (run((1, left), (2, right)) - run((1, left), (3, right))).abs().mean(dim=(0, 1, 2))
    assert changed[6:].mean() > 3 * changed[:6].mean() > 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.floats(0, 1), st.integers(0, 999)
)
def test_a_mask_of_any_size_becomes_averages_on_the_tokens(stage_c, adapter, rows, columns, down, batch, level, seed):
    """Feathered values are kept: each token has the mean of what it covers, and nothing leaves the mask's range."""
    latent, size = torch.zeros(batch, 16, rows, columns), (rows * down, columns * down)
    mask = torch.rand(batch, *size, generator=torch.Generator().manual_seed(seed)) * level
    applied = AppliedIPAdapter(adapter, pictures(), mask=mask)
    fitted = fitted_mask(applied, stage_c, latent, (rows * 42, columns * 42))
    by_hand = mask.reshape(batch, rows, down, columns, down).mean(dim=(2, 4))
    assert torch.allclose(fitted, by_hand, atol=1e-6) and fitted.max() <= mask.max()
    even = AppliedIPAdapter(adapter, pictures(), mask=torch.full((1, *size), level))
    found = fitted_mask(even, stage_c, latent, (rows * 42, columns * 42))
    assert found is None if level == 1 else torch.allclose(found, torch.tensor(level), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(64, 2048), st.integers(64, 2048), st.floats(0.5, 3))
def test_a_mask_of_the_pictures_shape_fits_at_any_size(stage_c, adapter, height, width, scale):
    latent = torch.zeros(1, 16, *stage_c_size(height, width))
    mask = torch.rand(1, max(1, round(height * scale)), max(1, round(width * scale)))
    applied = AppliedIPAdapter(adapter, pictures(), mask=mask)
    assert fitted_mask(applied, stage_c, latent, (height, width)).shape[1:] == latent.shape[2:]


def test_masks_that_do_not_fit_are_refused_with_their_sizes(stage_c, adapter, sampled):
    def refused(match, mask, batch=1):
        with pytest.raises(ValueError, match=match):
            sampled(apply_ip_adapter(stage_c, adapter, pictures(), mask=mask), batch, SIZE)

    refused(r"mask of IP-Adapter .* is 64 x 64 and the picture to make is 512 x 256 .* 12 x 6", torch.zeros(1, 64, 64))
    refused("given 2 masks and 3 pictures are made, expected 1 or 3", torch.ones(2, 256, 512), batch=3)
    refused(r"mask of the IP-Adapter is \[1, 1, 8, 16\]", torch.ones(1, 1, 8, 16))
    refused("mask of the IP-Adapter is str", "white")


def test_values_outside_of_the_range_of_masks_are_clamped(stage_c, adapter, sampled):
    whole = sampled(apply_ip_adapter(stage_c, adapter, pictures(), mask=WHOLE * 7), 1, SIZE)
    assert torch.equal(whole, sampled(apply_ip_adapter(stage_c, adapter, pictures()), 1, SIZE))


def test_it_says_where_it_acts(stage_c, adapter):
    applied = apply_ip_adapter(stage_c, adapter, pictures(), 0.5, mask=left_half(), groups=(0, 0.5, 1, 2))
    said = "IP-Adapter custom (adapter.safetensors) at 0.5, block groups 0 0.5 1 2, 50% of the picture"
    assert applied.ip_adapters[0].describe() == said


# Groups of blocks --------------------------------------------------------------------------------------------


def test_groups_are_the_levels_in_the_order_in_which_they_run():
    model = StageC(c_cond=8, c_hidden=[8, 8], nhead=[1, 1], blocks=[[1, 2], [3, 4]], c_clip_text=8,
                   c_clip_text_pooled=8, c_clip_img=8, c_r=4)  # fmt: skip
    assert attention_groups(model) == [1, 2, 3, 4]
    bare = StageC(c_cond=8, c_hidden=[8], nhead=[1], blocks=[[1], [2]], block_repeat=[[1], [1]], level_config=["CTA"],
                  c_clip_text=8, c_clip_text_pooled=8, c_clip_img=8, c_r=4, switch_level=[], dropout=[0.0])  # fmt: skip
    assert attention_groups(bare) == [1, 2]


def test_weights_of_groups_go_from_none_to_the_whole(stage_c, adapter, sampled):
    def run(*groups, weight=0.7):
        return sampled(apply_ip_adapter(stage_c, adapter, pictures(), weight, groups=groups))

    plain, whole = sampled(stage_c), run()
    assert torch.equal(run(0, 0, 0, 0), plain)
    assert torch.equal(run(1, 1, 1, 1), whole)
    near(run(2, 2, 2, 2, weight=0.35), whole)
    alone = [run(*(float(number == group) for number in range(4))) for group in range(4)]
    for number, one in enumerate(alone):
        for other in (*alone[:number], plain, whole):
            differ(one, other)


def test_groups_that_this_stage_c_does_not_have_are_refused(stage_c, adapter):
    with pytest.raises(ValueError, match=r"2 weights of block groups .* Stage C custom \(c.safetensors\) form 4"):
        apply_ip_adapter(stage_c, adapter, pictures(), groups=(1, 0))
    with pytest.raises(ValueError, match="applied with nan"):
        apply_ip_adapter(stage_c, adapter, pictures(), groups=(1, 0, float("nan"), 1))


# Several pictures --------------------------------------------------------------------------------------------


def test_several_pictures_are_read_together_averaged_or_one_each(stage_c, adapter, sampled):
    embeddings = pictures(batch=2)

    def run(how, of=embeddings):
        return sampled(apply_ip_adapter(stage_c, adapter, combined(of, how)), batch=2)

    together, average, each = map(run, COMBINE)
    assert torch.equal(average, run("concatenate", embeddings.mean(dim=0, keepdim=True)))
    near(each[:1], run("concatenate", embeddings[:1])[:1])
    near(each[1:], run("concatenate", embeddings[1:])[1:])
    assert torch.equal(together, run("one each", embeddings.reshape(1, 2, -1)))
    for first, second in ((together, average), (together, each), (average, each)):
        differ(first, second)
    for how in COMBINE:
        near(run(how, embeddings[:1]), run("concatenate", embeddings[:1]))
    with pytest.raises(ValueError, match="given 3 pictures and 2 pictures are made, expected 1 or 2"):
        run("one each", pictures(batch=3))
    with pytest.raises(ValueError, match="combined by 'sum', expected one of concatenate, average, one each"):
        combined(embeddings, "sum")
