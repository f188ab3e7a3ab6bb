"""diffusers computes from the same weights what our networks compute: an implementation that is not ours.

And it makes the same pictures, through its own text encoding, pipelines and scheduler.
"""

import pytest
import torch
from conftest import randomised

from stable_cascade_nodes.benchmarks.diffusers_models import diffusers_config, diffusers_model, diffusers_weights
from stable_cascade_nodes.benchmarks.models import CONFIGS, random_stage
from stable_cascade_nodes.benchmarks.pipeline_cases import (
    diffusers_pipelines,
    diffusers_tokenizer,
    matching_scheduler,
    picture_difference,
    text_to_image,
)
from stable_cascade_nodes.benchmarks.stage_cases import Setting, exact_time_embedding
from stable_cascade_nodes.cascade_ops.models import StageA, StageB, StageC
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.stages import encode_text

TOLERANCE = 2e-5
SMALL_C, SMALL_B, SMALL_A = (CONFIGS[stage]["small"] for stage in ("stage_c", "stage_b", "stage_a"))
SWITCHED_C = {**SMALL_C, "switch_level": [True], "t_conds": ["sca"], "self_attn": False}
REPEATED_B = {**SMALL_B, "block_repeat": [[1, 2, 1, 1], [3, 2, 1, 1]], "t_conds": []}
DEEP_A = {**SMALL_A, "levels": 3, "scale_factor": 0.3764}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def both(stage, cls, config):
    """Ours with weights that let every input matter, and diffusers' over them."""
    ours = randomised(cls(**config), 3)
    for name, buffer in ours.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return ours, diffusers_model(stage, config, ours.state_dict())


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [SMALL_C, SWITCHED_C], ids=["small", "switched"])
@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [(1, 6, 6, 77), (2, 4, 8, 9)])
def test_stage_c(config, batch, height, width, tokens):
    ours, theirs = both("stage_c", StageC, config)
    x, ratio = noise(batch, 16, height, width), torch.linspace(0.2, 0.9, batch)
    text, pooled, image = noise(batch, tokens, 20, seed=1), noise(batch, 1, 24, seed=2), noise(batch, 1, 12, seed=3)
    expected = theirs(x, ratio, clip_text_pooled=pooled, clip_text=text, clip_img=image).sample
    assert relative_error(ours(x, ratio, text, pooled, image), expected) < TOLERANCE


@pytest.mark.parametrize("config", [SMALL_B, REPEATED_B], ids=["small", "repeated"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 16, 48)])
def test_stage_b(config, batch, height, width):
    ours, theirs = both("stage_b", StageB, config)
    x, ratio = noise(batch, 4, height, width), torch.linspace(0.2, 0.9, batch)
    prior, pooled = noise(batch, 16, 3, 4, seed=1), noise(batch, 1, 24, seed=2)
    pixels = noise(batch, 3, 5, 6, seed=3)
    expected = theirs(x, ratio, clip_text_pooled=pooled, effnet=prior).sample
    assert relative_error(ours(x, ratio, prior, pooled), expected) < TOLERANCE
    expected = theirs(x, ratio, clip_text_pooled=pooled, effnet=prior, pixels=pixels).sample
    assert relative_error(ours(x, ratio, prior, pooled, pixels), expected) < TOLERANCE


@pytest.mark.parametrize("config", [SMALL_A, DEEP_A], ids=["small", "deep"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 8, 24)])
def test_stage_a(config, batch, height, width):
    ours, theirs = both("stage_a", StageA, config)
    factor = config.get("scale_factor", 0.43)
    latent, picture = noise(batch, 4, height, width), noise(batch, 3, 4 * height, 4 * width, seed=1).sigmoid()
    assert relative_error(ours.decode(latent), theirs.decode(factor * latent).sample) < TOLERANCE
    assert relative_error(ours.encode(picture)[0] * factor, theirs.encode(picture).latents) < TOLERANCE


@pytest.mark.parametrize("stage", CONFIGS)
def test_published_sizes_have_the_same_tensors(stage):
    from stable_cascade_nodes.benchmarks.diffusers_models import diffusers_class
    from stable_cascade_nodes.benchmarks.models import without_memory

    for config in CONFIGS[stage].values():
        with torch.device("meta"):
            theirs = diffusers_class(stage)(**diffusers_config(stage, config)).state_dict()
        ours = diffusers_weights(stage, without_memory(stage, config).state_dict())
        assert {name: tensor.shape for name, tensor in ours.items()} == {
            name: tensor.shape for name, tensor in theirs.items()
        }


def test_weights_are_shared():
    ours = random_stage("stage_c", "small")
    theirs = diffusers_model("stage_c", SMALL_C, ours.state_dict())
    memory = {tensor.untyped_storage().data_ptr() for tensor in ours.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in theirs.parameters()} == memory


def test_blocks_that_diffusers_lacks_are_refused():
    with pytest.raises(ValueError, match=r"blocks \['F'\].*compare another"):
        diffusers_config("stage_c", {**SMALL_C, "level_config": ["CTA", "CTF"]})


def test_exact_time_embedding_tells_neighbouring_levels_apart_in_bfloat16():
    theirs = diffusers_model("stage_c", SMALL_C, random_stage("stage_c", "small", dtype=torch.bfloat16).state_dict())
    levels = torch.tensor([0.5, 0.501])
    before = theirs.get_timestep_ratio_embedding(levels.bfloat16())
    assert torch.equal(before[0], before[1])
    exact_time_embedding(theirs)
    after = theirs.get_timestep_ratio_embedding(levels)
    assert after.dtype == torch.bfloat16
    assert (after[0] - after[1]).abs().max() > 0.5
    rounded = levels.bfloat16()
    assert torch.equal(
        theirs.get_timestep_ratio_embedding(rounded), theirs.get_timestep_ratio_embedding(rounded.float())
    )


def test_matching_scheduler_ends_on_the_clean_latent():
    from diffusers import DDPMWuerstchenScheduler

    clean, epsilon = noise(1, 4, 3, 3), noise(1, 4, 3, 3, seed=1)
    matching, plain = matching_scheduler(), DDPMWuerstchenScheduler()
    for scheduler in (matching, plain):
        scheduler.set_timesteps(4)
    assert matching.timesteps[0] == pytest.approx(0.9936, abs=1e-4)
    assert torch.equal(matching.timesteps[1:], plain.timesteps[1:])
    for index in (1, 3):
        time = plain.timesteps[index][None]
        noisy = plain.add_noise(clean, epsilon, time)
        made, usual = (
            scheduler.step(epsilon, time, noisy, torch.Generator().manual_seed(0)).prev_sample
            for scheduler in (matching, plain)
        )
        assert torch.equal(made, usual) == (index == 1)
    assert torch.allclose(made, clean, rtol=0, atol=1e-5)
    assert not torch.allclose(usual, clean, rtol=0, atol=2e-4)


def test_the_tokenizer_is_clips():
    tokenizer = diffusers_tokenizer()
    # From CLIP's published vocabulary.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("a cat", padding="max_length", max_length=77)
    assert padded.input_ids[4:] == [49407] * 73
    assert padded.attention_mask == [1] * 4 + [0] * 73


def test_text_is_encoded_alike():
    pipeline = CascadePipeline.load("tiny", device="cpu")
    prior, _ = diffusers_pipelines(pipeline)
    hidden, pooled, negative, negative_pooled = prior.encode_prompt(
        "cpu", 1, 1, True, prompt="a large red circle, on blue", negative_prompt="a square"
    )
    for text, theirs in (
        ("a large red circle, on blue", (hidden, pooled)),
        ("a square", (negative, negative_pooled)),
    ):
        ours = encode_text(pipeline.text_encoder, text)
        assert relative_error(ours.hidden, theirs[0]) < TOLERANCE
        assert relative_error(ours.pooled[:, None], theirs[1]) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
def test_tiny_text_to_image_makes_the_same_pictures(batch):
    sides = text_to_image("tiny", batch, Setting(quick=True))
    ours, theirs = sides.ours(), sides.theirs_to_check()
    assert [picture.size for picture in ours] == [(256, 256)] * batch
    assert picture_difference(ours, theirs) < 1e-4
    # As diffusers' scheduler is by itself, the start and the end of a run differ a little.
    assert 1e-3 < picture_difference(ours, sides.theirs()) < 0.1


def test_random_chain_makes_the_same_pictures():
    sides = text_to_image("lite", 2, Setting(quick=True))
    ours = sides.ours()
    assert picture_difference(ours, sides.theirs_to_check()) < 1e-4
    low, high = ours[0].convert("L").getextrema()
    assert 0 < low < high < 255
