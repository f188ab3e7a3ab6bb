"""The sampling loop with Stage C and Stage B: golden runs, noise per image, callbacks."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sampling_kit import Towards, start

from stable_cascade_nodes.cascade_ops.denoisers import (
    StageBDenoiser,
    StageCDenoiser,
    SteppedControl,
    TextCondition,
)
from stable_cascade_nodes.cascade_ops.diffusion import (
    SAMPLERS,
    TARGETS,
    Guidance,
    draw_noise,
    image_generators,
    log_snr_at,
    noise_cond,
    sample,
    sampling,
    signal_and_noise,
)
from stable_cascade_nodes.cascade_ops.models import StageB, StageC

DATA = Path(__file__).parent / "data"
_spec = importlib.util.spec_from_file_location("golden_fill", DATA / "fill.py")
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)

GOLDEN_RUNS = sorted(path.stem.removeprefix("sample_") for path in (DATA / "golden").glob("sample_*.safetensors"))


def golden(name):
    with safe_open(DATA / f"golden/{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def filled(model_class, metadata):
    model = model_class(**json.loads(metadata["config"]))
    return _fill.fill_module(model, int(metadata["seed"])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stage_c():
    return filled(StageC, golden("stage_c_two_level")[1])


@pytest.fixture(scope="module")
def stage_b():
    return filled(StageB, golden("stage_b")[1])


@pytest.fixture(scope="module")
def text():
    """Conditions that all images share: a prompt, and a negative of the same length."""
    values, _ = golden("stage_c_two_level")
    hidden, pooled = values["clip_text"], values["clip_text_pooled"]
    return TextCondition(hidden[:1], pooled[:1]), TextCondition(hidden[1:], pooled[1:])


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# Golden runs


def test_there_are_golden_runs():
    assert {"ddpm", "ddim", "lcm"} <= set(GOLDEN_RUNS)


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_whole_runs_match_the_reference(name, monkeypatch):
    values, metadata = golden(f"sample_{name}")
    arguments = json.loads(metadata["arguments"])
    steps = iter(values["noise"])
    monkeypatch.setattr(sampling, "draw_noise", lambda *_: next(steps))
    scale = arguments["cfg"]
    text = TextCondition(values["clip_text"], values["clip_text_pooled"])
    denoiser = StageCDenoiser(
        filled(StageC, metadata),
        text,
        TextCondition(*(torch.zeros_like(part) for part in text)),
        values["clip_img"],
    )
    sampled = sample(
        denoiser,
        values["x_init"],
        steps=arguments["timesteps"],
        sampler=name.split("_")[0],
        shift=arguments["shift"],
        t_start=arguments.get("t_start", 1.0),
        guidance=Guidance(
            tuple(scale) if isinstance(scale, list) else scale,
            rescale=arguments.get("cfg_rho", 0.7),
            rescale_over="batch",
        ),
        generators=image_generators(0, 2),
    )
    assert relative(sampled.latent, values["x0"]) < 1e-3
    assert relative(sampled.noisy, values["x"]) < 1e-3


# Noise per image


def test_an_image_has_its_own_noise():
    batch = draw_noise(image_generators(10, 3), (3, 2, 4, 4))
    alone = draw_noise(image_generators(12, 1), (1, 2, 4, 4))
    assert torch.equal(batch[2:], alone)
    assert not torch.equal(batch[0], batch[1])
    assert draw_noise(image_generators(2**64 - 1, 2), (2, 1, 1, 1))[1] == draw_noise(
        image_generators(0, 1), (1, 1, 1, 1)
    )


def test_a_generator_is_needed_per_image(stage_c, text):
    with pytest.raises(ValueError, match="2 noise generators for a batch of 3"):
        draw_noise(image_generators(0, 2), (3, 1, 1, 1))
    with pytest.raises(ValueError, match="2 noise generators for a batch of 3"):
        sample(StageCDenoiser(stage_c, *text), torch.zeros(3, 16, 4, 4), steps=1, generators=image_generators(0, 2))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(stage_c, text, sampler):
    def images(seed, batch):
        generators = image_generators(seed, batch)
        denoiser = StageCDenoiser(stage_c, *text)
        return sample(
            denoiser,
            start(generators),
            steps=5,
            sampler=sampler,
            shift=2.0,
            guidance=Guidance(4.0),
            generators=generators,
        ).latent

    four, three, alone = images(7, 4), images(8, 3), images(10, 1)
    assert relative(four[3:], alone) < 1e-4
    assert relative(three[2:], alone) < 1e-4
    assert relative(four[1:], three) < 1e-4
    assert relative(four[2:3], alone) > 0.1


def test_each_image_can_have_its_own_prompt(stage_c):
    values, _ = golden("stage_c_two_level")
    text = TextCondition(values["clip_text"], values["clip_text_pooled"][:, 0])
    negative = TextCondition(text.hidden[:1] * 0, text.pooled[:1] * 0)

    def images(positive, seed, batch):
        generators = image_generators(seed, batch)
        return sample(
            StageCDenoiser(stage_c, positive, negative),
            start(generators),
            steps=3,
            guidance=Guidance(3.0),
            generators=generators,
        ).latent

    both = images(text, 0, 2)
    second = images(TextCondition(text.hidden[1:], text.pooled[1:]), 1, 1)
    assert relative(both[1:], second) < 1e-4


# Stage C's denoiser


def predictions(denoiser, x, level, guided):
    return denoiser.prepare(torch.tensor([0.9, level]), x.shape, guided)(x, 1, guided)


def test_stage_c_halves_equal_plain_forward_passes(stage_c, text):
    values, _ = golden("stage_c_two_level")
    x = values["x"]
    cond, uncond = predictions(StageCDenoiser(stage_c, *text, values["clip_img"]), x, 0.4, True)
    for ours, part, image in ((cond, text[0], values["clip_img"]), (uncond, text[1], values["clip_img"] * 0)):
        expected = stage_c(
            x, torch.full((2,), 0.4), part.hidden.expand(2, -1, -1), part.pooled.expand(2, -1, -1), image
        )
        assert relative(ours, expected) < 1e-5


def test_without_a_picture_the_image_token_is_zero_as_in_training(stage_c, text):
    x = golden("stage_c_two_level")[0]["x"]
    cond, uncond = predictions(StageCDenoiser(stage_c, *text), x, 0.4, False)
    assert uncond is None
    hidden, pooled = (part.expand(2, -1, -1) for part in text[0])
    expected = stage_c(x, torch.full((2,), 0.4), hidden, pooled, torch.zeros(2, 1, 24))
    assert relative(cond, expected) < 1e-5


def test_prompts_of_different_lengths_do_not_disturb_each_other(stage_c, text):
    x = golden("stage_c_two_level")[0]["x"]
    longer = TextCondition(torch.cat([text[0].hidden, text[1].hidden], dim=1), text[0].pooled)
    mixed = predictions(StageCDenoiser(stage_c, longer, text[1]), x, 0.4, True)
    alone = [predictions(StageCDenoiser(stage_c, part), x, 0.4, False)[0] for part in (longer, text[1])]
    for ours, expected in zip(mixed, alone, strict=True):
        assert relative(ours, expected) < 1e-5
    assert relative(mixed[0], mixed[1]) > 1e-3


def test_control_reaches_both_halves(stage_c, text):
    values, _ = golden("stage_c_two_level")
    controls = [values.get(f"control.{index}") for index in range(10)]
    for batch in (1, 2):
        part = [None if residual is None else residual[:batch] for residual in controls]
        with_control = predictions(
            StageCDenoiser(stage_c, *text, controls=[SteppedControl(part)]), values["x"], 0.4, True
        )
        for ours, condition in zip(with_control, text, strict=True):
            hidden, pooled = (value.expand(2, -1, -1) for value in condition)
            expected = stage_c(values["x"], torch.full((2,), 0.4), hidden, pooled, torch.zeros(2, 1, 24), control=part)
            assert relative(ours, expected) < 1e-5


def batch_sizes(monkeypatch, model):
    seen, step = [], model.step

    def recording(x, *arguments, **settings):
        seen.append(len(x))
        return step(x, *arguments, **settings)

    monkeypatch.setattr(model, "step", recording)
    return seen


@pytest.mark.parametrize(
    ("guidance", "sizes"),
    [
        (Guidance(1.0), [3] * 5),
        (Guidance(4.0), [6] * 5),
        (Guidance(4.0, interval=(0.8, 0.4)), [3, 6, 6, 6, 3]),
    ],
)
def test_the_unconditional_half_is_only_run_where_it_counts(stage_c, text, monkeypatch, guidance, sizes):
    seen = batch_sizes(monkeypatch, stage_c)
    generators = image_generators(0, 3)
    sample(StageCDenoiser(stage_c, *text), start(generators), steps=5, guidance=guidance, generators=generators)
    assert seen == sizes


def test_an_interval_only_changes_the_steps_outside_of_it(stage_c, text):
    def latents(guidance, steps=5, **settings):
        kept = []
        sample(
            StageCDenoiser(stage_c, *text),
            start(image_generators(0, 1)),
            steps=steps,
            sampler="ddim",
            guidance=guidance,
            callback=lambda info: kept.append(info.latent),
            **settings,
        )
        return kept

    off, always, part = (latents(g) for g in (Guidance(), Guidance(4.0), Guidance(4.0, interval=(1.0, 0.6))))
    assert torch.equal(part[2], always[2])
    assert not torch.allclose(part[3], always[3])
    late = latents(Guidance(4.0, interval=(0.6, 0.0)))
    assert relative(late[1], off[1]) < 1e-5
    assert relative(late[2], off[2]) > 1e-3


def test_guidance_without_a_negative_is_refused(stage_c, stage_b, text):
    with pytest.raises(ValueError, match="Stage C was given none"):
        sample(StageCDenoiser(stage_c, text[0]), torch.zeros(1, 16, 4, 4), steps=1, guidance=Guidance(4.0))
    with pytest.raises(ValueError, match="Stage B was given none"):
        StageBDenoiser(stage_b, torch.zeros(1, 16, 3, 4), torch.zeros(1, 40)).prepare(torch.ones(1), (1, 4, 8, 8), True)


def test_conditions_for_another_batch_are_refused(stage_c, stage_b, text):
    three = TextCondition(text[0].hidden.repeat(3, 1, 1), text[0].pooled.repeat(3, 1, 1))
    with pytest.raises(ValueError, match=r"prompt has the shape \(3, 11, 40\)"):
        StageCDenoiser(stage_c, three).prepare(torch.ones(1), (2, 16, 4, 4), False)
    with pytest.raises(ValueError, match="Stage C latent has the shape"):
        StageBDenoiser(stage_b, torch.zeros(3, 16, 3, 4), torch.zeros(1, 40)).prepare(
            torch.ones(1), (2, 4, 8, 8), False
        )


def test_state_is_float32_whatever_the_model_is(text):
    model = filled(StageC, golden("stage_c_two_level")[1])
    generators = image_generators(0, 1)
    settings = {"steps": 3, "guidance": Guidance(2.0), "sampler": "ddim"}
    full = sample(StageCDenoiser(model, *text), start(generators), **settings)
    half = sample(StageCDenoiser(model.bfloat16(), *text), start(image_generators(0, 1)).bfloat16(), **settings)
    assert half.latent.dtype == half.noisy.dtype == torch.float32
    assert 1e-4 < relative(half.latent, full.latent) < 0.1


# Stage B's denoiser


def test_stage_b_runs_like_the_reference_loop(stage_b):
    values, _ = golden("stage_b")
    effnet, pooled = values["effnet"], values["clip"]
    x = torch.randn(2, 4, 32, 48, generator=torch.Generator().manual_seed(0))
    denoiser = StageBDenoiser(stage_b, effnet, pooled, pooled.flip(0))
    sampled = sample(denoiser, x, steps=3, sampler="ddim", guidance=Guidance(1.5))
    levels = log_snr_at(torch.linspace(1, 0, 4))
    for now, after in pairwise(levels):
        level = noise_cond(now).expand(2)
        cond = stage_b(x, level, effnet, pooled)
        uncond = stage_b(x, level, torch.zeros_like(effnet), pooled.flip(0))
        guided = uncond + 1.5 * (cond - uncond)
        guided = 0.3 * guided + 0.7 * guided * cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        a, b = signal_and_noise(now)
        x0 = (x - b * guided) / a
        a, b = signal_and_noise(after)
        x = a * x0 + b * guided
    assert relative(sampled.latent, x0) < 1e-4


def test_stage_b_without_guidance_computes_one_half_and_shares_one_condition(stage_b, monkeypatch):
    values, _ = golden("stage_b")
    seen = batch_sizes(monkeypatch, stage_b)
    generators = image_generators(0, 2)
    noise = start(generators, 4, (18, 22))
    denoiser = StageBDenoiser(stage_b, values["effnet"][:1], values["clip"][:1, 0])
    latent = sample(denoiser, noise, steps=2, generators=generators).latent
    assert seen == [2, 2]
    generators = image_generators(1, 1)
    alone = sample(denoiser, start(generators, 4, (18, 22)), steps=2, generators=generators).latent
    assert relative(latent[1:], alone) < 1e-4


# Callbacks and refusals


def test_the_callback_follows_every_step():
    infos = []
    denoiser = Towards(2.0)
    x = start(image_generators(0, 1), 4)
    sampled = sample(denoiser, x, steps=5, sampler="ddim", shift=2.0, callback=infos.append)
    assert [info.step for info in infos] == [0, 1, 2, 3, 4]
    assert {info.steps for info in infos} == {5}
    assert [info.t for info in infos] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [info.log_snr for info in infos] == pytest.approx(log_snr_at(torch.linspace(1, 0, 6), shift=2)[:-1].tolist())
    for info, shown in zip(infos, denoiser.seen[1:], strict=False):
        assert torch.equal(info.latent, shown[0])
        torch.testing.assert_close(info.denoised, torch.full_like(x, 2.0), rtol=0, atol=1e-2)
    assert torch.equal(infos[-1].latent, sampled.noisy)
    assert torch.equal(infos[-1].denoised, sampled.latent)


@pytest.mark.parametrize("last", range(4))
def test_an_exception_in_the_callback_ends_the_run_at_every_step(last):
    class Cancelled(Exception):
        pass

    def callback(info):
        if info.step == last:
            raise Cancelled

    denoiser = Towards(2.0)
    with pytest.raises(Cancelled):
        sample(denoiser, start(image_generators(0, 1), 4), steps=4, sampler="ddim", callback=callback)
    assert len(denoiser.seen) == last + 1


def test_inputs_are_left_alone(stage_c, text):
    generators = image_generators(0, 2)
    x, clean, mask = start(generators), torch.ones(2, 16, 6, 8), torch.zeros(6, 8)
    mask[2:] = 1
    before = [value.clone() for value in (x, clean, mask, *text[0], *text[1])]
    sample(
        StageCDenoiser(stage_c, *text),
        x,
        steps=2,
        guidance=Guidance(2.0),
        generators=generators,
        clean=clean,
        mask=mask,
    )
    for value, copy in zip((x, clean, mask, *text[0], *text[1]), before, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"t_start": 0.3, "t_end": 0.5}, "runs from 0.3 to 0.5"),
        ({"t_start": 1.2}, "runs from 1.2"),
        ({"sampler": "heun"}, "no sampler 'heun'"),
        ({"schedule": "karras"}, "no schedule 'karras'"),
        ({"target": "score"}, "no target 'score'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(Towards(0.0), torch.zeros(1, 4, 4, 4), **{"steps": 2, "sampler": "ddim", **settings})


def test_an_overflow_is_reported():
    with pytest.raises(ValueError, match="NaN"):
        sample(Towards(float("nan")), torch.zeros(1, 4, 4, 4), steps=2, sampler="ddim")


@pytest.mark.parametrize("target", ["epsilon", "x0", "v", "rectified_flow"])
def test_models_with_other_targets_are_read_rightly(target):

    class Perfect(Towards):
        def prepare(self, noise_cond, shape, guided):
            epsilon_of = super().prepare(noise_cond, shape, guided)

            def predict(x, index, guided):
                epsilon, _ = epsilon_of(x, index, guided)
                _, a, b = self.seen[-1]
                return TARGETS[target].make(torch.full_like(x, self.goal), epsilon, a, b), None

            return predict

    sampled = sample(Perfect(2.0), start(image_generators(0, 1), 4), steps=5, sampler="ddim", target=target)
    torch.testing.assert_close(sampled.latent, torch.full_like(sampled.latent, 2.0), rtol=0, atol=1e-2)
