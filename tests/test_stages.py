"""The chain as plain functions, on small random models."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_cascade_nodes.cascade_ops import stages, wires
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.cascade_ops.wires import Latent, read_condition, read_latent

STEPS = SamplingSettings(steps=2)


@pytest.fixture(scope="module")
def texts(handles):
    return SimpleNamespace(
        red=stages.encode_text(handles["text_encoder"], "a red circle"),
        blue=stages.encode_text(handles["text_encoder"], "a blue circle"),
        empty=stages.encode_text(handles["text_encoder"], ""),
    )


@pytest.fixture
def run_c(handles, texts):
    def run(latent=None, positive=texts.red, negative=texts.empty, seed=1, callback=None, **settings):
        latent = latent or stages.empty_latent(handles["stage_c"], 100, 100)
        chosen = replace(STEPS, **settings)
        return stages.sample_stage_c(
            handles["stage_c"], positive, negative, latent, seed=seed, settings=chosen, callback=callback
        )

    return run


@pytest.fixture(scope="module")
def prior(handles, texts):
    latent = stages.empty_latent(handles["stage_c"], 100, 60, 2)
    return stages.sample_stage_c(handles["stage_c"], texts.red, texts.empty, latent, seed=1, settings=STEPS)


@pytest.fixture
def run_b(handles, texts, prior):
    def run(latent=prior, positive=texts.red, negative=texts.empty, seed=1, start_latent=None, handle=None, **settings):
        chosen = replace(STEPS, **settings)
        return stages.sample_stage_b(
            handle or handles["stage_b"],
            latent,
            positive,
            negative,
            seed=seed,
            settings=chosen,
            start_latent=start_latent,
        )

    return run


def hashes(*values):
    """The exact bytes of all tensors in nested values and modules."""
    found = []
    for value in values:
        if isinstance(value, torch.nn.Module):
            found += hashes(*value.state_dict().values())
        elif isinstance(value, torch.Tensor):
            found.append(hash(value.contiguous().view(-1).numpy().tobytes()))
        elif isinstance(value, (list, tuple)):
            found += hashes(*value)
        elif isinstance(value, dict):
            found += hashes(*value.values())
    return found


# Sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "stage_c", "stage_b"),
    [(1000, 1000, (24, 24), (250, 250)), (1001, 512, (12, 24), (128, 252)), (100, 60, (2, 3), (16, 26))],
)
def test_pixel_size_travels_with_the_latent(handles, width, height, stage_c, stage_b):
    latent = stages.empty_latent(handles["stage_c"], width, height)
    assert latent.samples.shape == (1, 16, *stage_c)
    assert read_latent(latent.to_wire()).stage_c_pixels() == (height, width)
    assert replace(latent, samples=torch.zeros(1, 4, *stage_b)).stage_b_pixels() == (height, width)


def test_whole_chain_comes_back_in_the_size_asked_for(handles, prior, run_b):
    assert prior.samples.shape == (2, 16, 2, 3)
    detail = run_b()
    assert detail.samples.shape == (2, 4, 16, 26)
    picture = stages.decode_stage_a(handles["stage_a"], detail)
    assert picture.shape == (2, 60, 100, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.01
    whole = stages.decode_stage_a(handles["stage_a"], replace(detail, width=None, height=None))
    assert whole.shape == (2, 64, 104, 3)
    assert torch.equal(picture, whole[:, :60, :100])


def test_size_without_the_keys_comes_from_the_samples():
    assert Latent(torch.zeros(1, 16, 24, 24)).stage_c_pixels() == (1024, 1024)
    assert Latent(torch.zeros(1, 4, 16, 26)).stage_b_pixels() == (64, 104)


def test_size_of_a_latent_that_was_resized_since_is_not_believed():
    grown = Latent(torch.zeros(1, 16, 48, 24), width=1024, height=1024)
    assert grown.stage_c_pixels() == (2048, 1024)
    assert Latent(torch.zeros(1, 4, 512, 256), width=1000, height=1000).stage_b_pixels() == (2048, 1024)


def test_zero_is_the_models_own_size(handles):
    latent = stages.empty_latent(handles["stage_c"], 0, 0)
    assert (latent.width, latent.height) == (128, 96)
    mixed = stages.empty_latent(handles["stage_c"], 0, 64)
    assert (mixed.width, mixed.height) == (128, 64)


def test_sizes_below_one_are_refused(handles):
    with pytest.raises(ValueError, match="at least 1"):
        stages.empty_latent(handles["stage_c"], -8, 64)
    with pytest.raises(ValueError, match="batch size is 0"):
        stages.empty_latent(handles["stage_c"], 64, 64, 0)


# Own values ----------------------------------------------------------------------------------------------------


def test_zero_is_the_models_own_guidance_and_shift(run_c, run_b):
    assert torch.equal(run_c().samples, run_c(guidance=3.0, shift=1.5).samples)
    assert torch.equal(run_b().samples, run_b(guidance=1.2, shift=1.0).samples)
    assert SamplingSettings().for_model(
        SimpleNamespace(info=SimpleNamespace(defaults={"guidance": 4, "shift": 2}))
    ) == (SamplingSettings(guidance=4, shift=2, sampler="ddpm"))


def test_auto_is_the_models_own_sampler(handles, run_b):
    def named(sampler):
        handle = handles["stage_b"]
        return replace(handle, info=replace(handle.info, defaults={**handle.info.defaults, "sampler": sampler}))

    own = run_b(handle=named("lcm")).samples
    assert torch.equal(own, run_b(sampler="lcm").samples)
    assert not torch.equal(own, run_b().samples)
    assert torch.equal(run_b(handle=named("lcm"), sampler="ddpm").samples, run_b().samples)
    assert "steps of lcm" in SamplingSettings().for_model(named("lcm")).describe()
    with pytest.raises(ValueError, match="There is no sampler 'heun'"):
        run_b(handle=named("heun"))


def test_release_values_where_the_file_has_none(tmp_path, small_family):
    for stage, expected in (
        ("stage_c", {"width": 1024, "height": 1024, "guidance": 4.0, "steps": 20, "shift": 2.0}),
        ("stage_b", {"guidance": 1.1, "steps": 10, "shift": 1.0}),
    ):
        config = json.dumps(load_stage(small_family.paths[stage], stage).info.config)
        save_file(
            load_file(small_family.paths[stage]),
            tmp_path / "plain.safetensors",
            {"cascade.stage": stage, "cascade.config": config},
        )
        assert load_stage(tmp_path / "plain.safetensors", stage).info.defaults == expected


# Every setting acts --------------------------------------------------------------------------------------------

CHANGES = {
    "guidance": 2.0,
    "shift": 3.0,
    "sampler": "ddim",
    "steps": 3,
    "end": 0.3,
    "guidance_end": 1.0,
    "guidance_from": 0.6,
    "guidance_until": 0.6,
    "rescale": 0.0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_stage_c(run_c, name):
    assert not torch.allclose(run_c().samples, run_c(**{name: CHANGES[name]}).samples, rtol=1e-3)


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_stage_b(run_b, name):
    assert not torch.allclose(run_b().samples, run_b(**{name: CHANGES[name]}).samples, rtol=1e-3)


def test_rescale_over_the_batch_changes_a_batch_only(run_c, handles):
    single, pair = (stages.empty_latent(handles["stage_c"], 100, 100, count) for count in (1, 2))
    assert torch.equal(run_c(single).samples, run_c(single, rescale_over="batch").samples)
    assert not torch.allclose(run_c(pair).samples, run_c(pair, rescale_over="batch").samples, rtol=1e-3)


def test_prompt_negative_and_seed_change_both_stages(run_c, run_b, texts):
    for run in (run_c, run_b):
        plain = run().samples
        for change in ({"positive": texts.blue}, {"negative": texts.blue}, {"seed": 2}):
            assert not torch.allclose(plain, run(**change).samples, rtol=1e-3), change


def test_start_below_one_starts_from_the_latent(run_c, handles):
    empty = stages.empty_latent(handles["stage_c"], 100, 100)
    picture = replace(empty, samples=torch.full_like(empty.samples, 3.0))
    assert torch.equal(run_c(picture).samples, run_c(empty).samples)
    assert not torch.allclose(run_c(picture, start=0.5).samples, run_c(empty, start=0.5).samples, rtol=1e-3)


def test_stage_b_refines_a_latent(run_b):
    first = run_b()
    refined = run_b(start_latent=first, start=0.3)
    assert refined.samples.shape == first.samples.shape
    other = run_b(start_latent=replace(first, samples=-first.samples), start=0.3)
    assert not torch.allclose(refined.samples, other.samples, rtol=1e-3)
    with pytest.raises(ValueError, match="without a latent to start from"):
        run_b(start=0.3)
    with pytest.raises(ValueError, match="has no effect when start is 1"):
        run_b(start_latent=first)
    with pytest.raises(ValueError, match="same picture size"):
        run_b(start_latent=replace(first, samples=first.samples[..., 2:]), start=0.3)


def test_noise_mask_holds_the_rest(run_c, run_b, handles):
    samples = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, 96, 96)
    mask[..., :32] = 1
    latent = Latent(samples, 100, 100, mask)
    held = run_c(latent).samples
    assert torch.equal(held[..., 1:], samples[..., 1:])
    assert not torch.allclose(held[..., 0], samples[..., 0], rtol=1e-2)
    assert run_c(latent).to_wire()["noise_mask"] is mask
    detail = run_b()
    start = replace(detail, mask=torch.zeros(1, 1, 16, 26))
    assert torch.equal(run_b(start_latent=start, seed=9).samples, detail.samples)


# Guidance and cost ---------------------------------------------------------------------------------------------


def test_guidance_one_asks_the_model_once_a_step_and_needs_no_negative(run_c, run_b, handles, monkeypatch):
    for stage, run in (("stage_c", run_c), ("stage_b", run_b)):
        batches = []
        module = handles[stage].module
        real = type(module).step

        def counted(self, x, *arguments, real=real, batches=batches, **named):
            batches.append(len(x))
            return real(self, x, *arguments, **named)

        monkeypatch.setattr(type(module), "step", counted)
        batch = len(run(guidance=2.0).samples)
        assert batches == [2 * batch] * 2
        batches.clear()
        run(guidance=1.0, negative=None)
        assert batches == [batch] * 2
        with pytest.raises(ValueError, match="needs a negative condition"):
            run(guidance=2.0, negative=None)
        monkeypatch.undo()


# Seeds ---------------------------------------------------------------------------------------------------------


def test_image_of_a_batch_is_the_image_of_its_own_seed(handles, texts):
    def chain(seed, batch):
        latent = stages.empty_latent(handles["stage_c"], 100, 60, batch)
        text = texts.red, texts.empty
        latent = stages.sample_stage_c(handles["stage_c"], *text, latent, seed=seed, settings=STEPS)
        latent = stages.sample_stage_b(handles["stage_b"], latent, *text, seed=seed, settings=STEPS)
        return stages.decode_stage_a(handles["stage_a"], latent)

    batch = chain(7, 3)
    for index in range(3):
        assert (batch[index] - chain(7 + index, 1)[0]).abs().max() < 1e-4
    assert (batch[0] - batch[1]).abs().max() > 1e-2


def test_batch_index_picks_the_seeds(run_c, run_b, prior, handles):
    three = run_c(stages.empty_latent(handles["stage_c"], 100, 100, 3)).samples
    single = stages.empty_latent(handles["stage_c"], 100, 100)
    last = run_c(replace(single, batch_index=(2,)))
    assert torch.allclose(last.samples, three[2:], rtol=1e-4, atol=1e-3)
    assert last.to_wire()["batch_index"] == [2]
    second = run_b(replace(prior, samples=prior.samples[1:], batch_index=(1,)))
    assert torch.allclose(second.samples, run_b().samples[1:], rtol=1e-4, atol=1e-3)
    assert second.batch_index == (1,)
    with pytest.raises(ValueError, match="2 numbers"):
        run_c(replace(single, batch_index=(0, 1)))


def test_runs_repeat_and_change_no_input(run_c, run_b, handles, texts):
    latent = Latent(torch.ones(1, 16, 3, 3), 100, 100, torch.rand(1, 1, 3, 3))
    modules = [handles[stage].module for stage in ("stage_c", "stage_b", "stage_a")]
    inputs = [*modules, latent.samples, latent.mask, tuple(texts.red), tuple(texts.empty)]
    before = hashes(*inputs)
    first = run_c(latent, start=0.8)
    assert torch.equal(first.samples, run_c(latent, start=0.8).samples)
    detail = run_b()
    assert torch.equal(detail.samples, run_b().samples)
    decoded = detail.samples.clone()
    stages.decode_stage_a(handles["stage_a"], detail)
    assert torch.equal(detail.samples, decoded)
    assert hashes(*inputs) == before


def test_a_callback_can_end_a_run(run_c):
    seen = []

    def stop(step):
        seen.append(step.step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_c(callback=stop)
    assert seen == [0]


# Refusals ------------------------------------------------------------------------------------------------------


def test_wrong_stages_and_latents_are_refused(handles, prior, run_b, run_c, texts):
    with pytest.raises(ValueError, match=r"Stage C custom \(c.safetensors\) was given where a Stage A is read"):
        stages.decode_stage_a(handles["stage_c"], run_b())
    with pytest.raises(ValueError, match=r"16 channels.*Stage A.*expects 4"):
        stages.decode_stage_a(handles["stage_a"], prior)
    with pytest.raises(ValueError, match=r"4 channels.*previewer.*expects 16"):
        stages.preview_latent(handles["previewer"], run_b())
    with pytest.raises(ValueError, match=r"4 channels.*connect the output of Stage C"):
        run_b(run_b())
    with pytest.raises(ValueError, match="4 channels"):
        run_c(run_b())


def test_text_of_another_width_is_refused(run_c, run_b, texts):
    wide = texts.red._replace(hidden=torch.zeros(1, 77, 1280))
    with pytest.raises(ValueError, match=r"The prompt was encoded 1280 wide and Stage C custom .* reads 64"):
        run_c(positive=wide)
    with pytest.raises(ValueError, match="The negative prompt was encoded 1280 wide"):
        run_c(negative=wide)
    pooled = texts.red._replace(pooled=torch.zeros(1, 1280))
    with pytest.raises(ValueError, match=r"pooled prompt was encoded 1280 wide and Stage B custom .* reads 32"):
        run_b(positive=pooled)


def test_families_do_not_mix(handles, prior, run_b):
    tiny = replace(handles["stage_b"], info=replace(handles["stage_b"].info, size="tiny", rank=3))
    release = replace(prior, family="release")
    assert tiny.family == "tiny"
    text = stages.TextCondition(torch.zeros(1, 77, 64), torch.zeros(1, 32))
    with pytest.raises(ValueError, match="belongs to the bundled tiny family and the latent was made by the published"):
        stages.sample_stage_b(tiny, release, text, text, seed=0, settings=STEPS)
    made = stages.sample_stage_b(tiny, replace(prior, family="tiny"), text, text, seed=0, settings=STEPS)
    assert made.to_wire()["cascade_family"] == "tiny"
    published = replace(handles["stage_a"], info=replace(handles["stage_a"].info, rank=0))
    with pytest.raises(ValueError, match="belongs to the published family"):
        stages.decode_stage_a(published, made)
    # Weights of someone's own go with either.
    assert stages.decode_stage_a(handles["stage_a"], made).shape == (2, 60, 100, 3)


def test_conditioning_of_core_nodes(texts):
    wire = [[texts.red.hidden, {"pooled_output": texts.red.pooled, "control": None}]]
    assert read_condition(wire, "positive").hidden is texts.red.hidden
    for broken, message in (
        (wire + wire, "combines 2 prompts"),
        ([], "holds no conditioning"),
        ([[texts.red.hidden, {}]], "has no pooled text"),
        ([[texts.red.hidden, {"pooled_output": None}]], "has no pooled text"),
        ([[texts.red.hidden, wire[0][1] | {"area": (1, 2, 3, 4)}]], "carries an area"),
        (
            [[texts.red.hidden, wire[0][1] | {"hooks": 1, "new_thing": 2}]],
            r"carries hooks \('hooks'\), 'new_thing', which",
        ),
        ([[texts.red.hidden, wire[0][1] | {"stable_cascade_prior": 1}]], "carries a Stage C latent for Stage B"),
    ):
        with pytest.raises(ValueError, match=message):
            read_condition(broken, "positive")
    with pytest.raises(ValueError, match="carries an area"):
        read_condition([[texts.red.hidden, wire[0][1] | {"area": (1, 2, 3, 4)}]], "positive", "stage_b")
    with pytest.raises(ValueError, match=r"samples of shape \[16, 3, 3\]"):
        read_latent({"samples": torch.zeros(16, 3, 3)})
    with pytest.raises(ValueError, match="holds str"):
        read_latent("latent")


def test_wires_round_trip():
    latent = Latent(torch.zeros(2, 16, 3, 3), 100, 90, torch.ones(1, 1, 3, 3), (4, 5), "tiny")
    back = read_latent(latent.to_wire())
    assert torch.equal(back.samples, latent.samples)
    assert torch.equal(back.mask, latent.mask)
    same = {"samples": back.samples, "mask": back.mask}
    assert vars(back) == vars(latent) | same
    assert list(Latent(torch.zeros(1, 16, 3, 3)).to_wire()) == ["samples"]
    # On a wire, a Stage B latent is what ComfyUI's own nodes make and take: Stage A's input without its scale.
    detail = Latent(torch.ones(1, 4, 4, 4))
    assert torch.allclose(detail.to_wire("stage_b")["samples"], torch.tensor(0.43))
    assert torch.allclose(read_latent(detail.to_wire("stage_b"), "stage_b").samples, detail.samples)
    hidden, pooled = torch.zeros(1, 77, 64), torch.zeros(1, 32)
    assert wires.read_condition(wires.write_condition(hidden, pooled), "positive").pooled is pooled


def test_previews(handles, prior, run_b):
    small = stages.preview_latent(handles["previewer"], prior)
    assert small.shape == (2, 16, 24, 3) and small.std() > 1e-3 and small.min() >= 0 and small.max() <= 1
    assert stages.preview_stage_b(handles["stage_a"], run_b().samples).shape == (2, 64, 104, 3)
    assert stages.preview_stage_b(handles["stage_a"], torch.zeros(1, 4, 128, 64)).shape == (1, 256, 128, 3)
    picture = stages.to_picture(torch.tensor([[[0.0, 0.5, 1.0]]]))
    assert picture.size == (1, 1) and picture.getpixel((0, 0)) == (0, 128, 255)
