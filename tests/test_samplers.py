"""Samplers on data whose best denoiser is known: independent Gaussians of mean 2 and deviation 0.5."""

import pytest
import torch

from stable_cascade_nodes.cascade_ops.diffusion import (
    SAMPLERS,
    Step,
    image_generators,
    log_snr_at,
    sample,
    signal_and_noise,
)

MEAN, STD = 2.0, 0.5
DETERMINISTIC = ["ddim", "euler", "dpmpp_2m"]
STOCHASTIC = ["ddpm", "euler_ancestral", "dpmpp_2m_sde"]


def marginal(log_snr):
    """Mean and deviation of the noised data at a level."""
    a, b = signal_and_noise(log_snr)
    return a * MEAN, (a * a * STD**2 + b * b).sqrt()


class GaussianDenoiser:
    """Predicts the noise that belongs to ``x0(x)``; the level is read back from the noise conditioning."""

    def x0(self, x, log_snr):
        """The posterior mean of the data."""
        a, _ = signal_and_noise(log_snr)
        mean, std = marginal(log_snr)
        return MEAN + a * (STD / std) ** 2 * (x - mean)

    def prepare(self, noise_cond, shape, guided):
        levels = log_snr_at(noise_cond)

        def predict(x, index, guided):
            a, b = signal_and_noise(levels[index])
            return (x - a * self.x0(x, levels[index])) / b, None

        return predict


class ConsistencyDenoiser(GaussianDenoiser):
    """Predicts where the probability-flow ODE through `x` ends."""

    def x0(self, x, log_snr):
        mean, std = marginal(log_snr)
        return MEAN + STD / std * (x - mean)


class PointDenoiser(GaussianDenoiser):
    """All data is the same number."""

    def x0(self, x, log_snr):
        return torch.full_like(x, MEAN)


def start(batch=2):
    return torch.randn(batch, 4, 64, 64, generator=torch.Generator().manual_seed(1))


def run(sampler, steps, denoiser=None, **settings):
    settings = {"generators": image_generators(0, 2), **settings}
    return sample(denoiser or GaussianDenoiser(), start(), steps=steps, sampler=sampler, **settings)


def ode_error(sampler, steps, **settings):
    """Largest distance from the exact solution of the probability-flow ODE at t = 0."""
    ends = log_snr_at(torch.tensor([1.0, 0.0]), shift=settings.get("shift", 1.0))
    (first_mean, last_mean), (first_std, last_std) = marginal(ends)
    exact = last_mean + last_std / first_std * (start() - first_mean)
    return (run(sampler, steps, **settings).noisy - exact).abs().max().item()


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_deterministic_samplers_converge_to_the_exact_solution(sampler, shift):
    errors = [ode_error(sampler, steps, shift=shift) for steps in (10, 40, 160)]
    # Below 2e-3 float32 decides.
    assert errors[1] < errors[0] / 2
    assert errors[2] < max(errors[1] / 2, 2e-3)
    assert errors[2] < 0.06


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_second_order_is_more_accurate_at_the_same_number_of_steps(steps):
    assert ode_error("dpmpp_2m", steps) < 0.5 * ode_error("euler", steps)


@pytest.mark.parametrize("sampler", DETERMINISTIC + STOCHASTIC)
def test_samples_have_the_deviation_of_the_data(sampler):
    mean, std = marginal(log_snr_at(0.0))
    noisy = run(sampler, 100).noisy
    assert noisy.mean().item() == pytest.approx(mean.item(), abs=0.03)
    assert noisy.std().item() == pytest.approx(std.item(), rel=0.04)


def test_the_stochastic_second_order_needs_fewer_steps_than_the_first():
    std = marginal(log_snr_at(0.0))[1]
    off = {name: abs(run(name, 20).noisy.std() - std).item() for name in ("ddpm", "dpmpp_2m_sde")}
    assert off["dpmpp_2m_sde"] < 0.5 * off["ddpm"]


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_lcm_samples_a_consistency_model_exactly_in_any_number_of_steps(steps):
    latent = run("lcm", steps, ConsistencyDenoiser()).latent
    assert latent.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert latent.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_the_result_holds_no_noise(sampler, steps):
    sampled = run(sampler, steps, PointDenoiser(), shift=2.0)
    torch.testing.assert_close(sampled.latent, torch.full_like(sampled.latent, MEAN), rtol=0, atol=1e-3)
    # What is left at t = 0 is the noise of the schedule's end.
    a, b = signal_and_noise(log_snr_at(0.0, shift=2.0))
    assert (sampled.noisy - a * MEAN).std().item() == pytest.approx(b.item(), rel=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_that_the_clamp_makes_equal_do_no_harm(sampler):
    levels = log_snr_at(torch.linspace(1, 0, 201), shift=0.2)
    assert (levels.diff() == 0).sum() > 5
    assert run(sampler, 200, shift=0.2).noisy.isfinite().all()


@pytest.mark.parametrize(("name", "twin"), [("euler", "ddim"), ("euler_ancestral", "ddpm")])
def test_names_for_the_same_method_agree(name, twin):
    generator = torch.Generator().manual_seed(0)
    x0, epsilon, noise = torch.randn(3, 1, 4, 8, 8, generator=generator)
    for now, after in [(-9.2, -5.0), (-1.0, 0.5), (4.0, 9.2)]:
        now, after = torch.tensor(now), torch.tensor(after)
        a, b = signal_and_noise(now)
        step = Step(a * x0 + b * epsilon, x0, epsilon, now, after)
        ours, theirs = (SAMPLERS[sampler](step, lambda: noise) for sampler in (name, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_draw_nothing(sampler):
    assert run(sampler, 3, generators=None).latent.isfinite().all()


@pytest.mark.parametrize("sampler", [*STOCHASTIC, "lcm"])
def test_stochastic_samplers_want_generators(sampler):
    with pytest.raises(ValueError, match="has no generators"):
        run(sampler, 3, generators=None)
    assert not torch.equal(run(sampler, 3).noisy, run(sampler, 3, generators=image_generators(9, 2)).noisy)


def test_a_run_can_be_split_in_two():
    whole = run("ddim", 10)
    first = run("ddim", 5, t_end=0.5)
    second = sample(GaussianDenoiser(), first.noisy, steps=5, sampler="ddim", t_start=0.5)
    torch.testing.assert_close(second.latent, whole.latent, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first.latent, whole.latent, atol=0.05)


@pytest.mark.parametrize("schedule", ["linear", "edm_sample", "sqrt"])
def test_other_schedules_lead_to_the_same_data(schedule):
    # The toy reads its level back through the cosine schedule, so stay inside that one's range.
    noisy = run("dpmpp_2m", 60, schedule=schedule, t_start=0.9, t_end=0.1)
    a, b = signal_and_noise(log_snr_at(0.1, schedule))
    first_mean, first_std = marginal(log_snr_at(0.9, schedule))
    scale = (a * a * STD**2 + b * b).sqrt() / first_std
    exact = a * MEAN + scale * (start() - first_mean)
    assert (noisy.noisy - exact).abs().max() < 0.05
