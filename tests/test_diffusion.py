"""Schedules, scaler, noise conditioning, targets and loss weights against the reference's numbers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stable_cascade_nodes.cascade_ops import diffusion
from stable_cascade_nodes.cascade_ops.diffusion import AdaptiveLossWeight, log_snr_at

GOLDEN = load_file(Path(__file__).parent / "data/golden/schedule.safetensors")
TIMES = GOLDEN["t"]
LEVELS = GOLDEN["logsnr.shift1.0"]


def close(ours, golden, rtol=1e-4):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, golden, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0])
def test_cosine_schedule_with_shift(shift):
    close(log_snr_at(TIMES, shift=shift), GOLDEN[f"logsnr.shift{shift}"])


@pytest.mark.parametrize("name", sorted(set(diffusion.SCHEDULES) - {"cosine"}))
def test_other_schedules(name):
    # The golden run kept these off the very ends, where some are infinite.
    close(log_snr_at(TIMES.clamp(1e-4, 0.9999), name), GOLDEN[f"schedule.{name}"])


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
@pytest.mark.parametrize("shift", [0.3, 1.0, 2.0, 8.0])
def test_every_schedule_is_finite_and_rises_from_noise_to_picture(name, shift):
    levels = log_snr_at(torch.linspace(1, 0, 101), name, shift)
    assert levels.isfinite().all()
    assert (levels.diff() >= 0).all()
    assert levels[0] < 0 < levels[-1]


def test_the_clamp_puts_the_ends_of_the_cosine_schedule_at_plus_and_minus_nine():
    ends = log_snr_at(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]) * math.log(0.9999 / 0.0001), rtol=1e-4, atol=0)
    # Shifted levels stay between the same ends.
    assert log_snr_at(1.0, shift=4) == ends[0]
    assert log_snr_at(0.0, shift=0.25) == ends[1]


def test_vp_scaler():
    a, b = diffusion.signal_and_noise(LEVELS)
    close(a, GOLDEN["a"])
    close(b, GOLDEN["b"])
    torch.testing.assert_close(a * a + b * b, torch.ones(21))


def test_noise_cond_is_the_time_of_the_unshifted_schedule():
    # At the clean end the reference loses digits: 1 - sigmoid there has 4 of float32's 7.
    close(diffusion.noise_cond(LEVELS)[:-1], GOLDEN["noise_cond"][:-1])
    close(diffusion.noise_cond(LEVELS)[-1:], GOLDEN["noise_cond"][-1:], rtol=1e-3)
    assert diffusion.noise_cond(LEVELS.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(set(diffusion.LOSS_WEIGHTS) - {"constant"}))
def test_loss_weights(name):
    close(diffusion.loss_weight(name, LEVELS), GOLDEN[f"loss.{name}"])


def test_default_loss_weight_of_the_reference_and_its_shift():
    close(diffusion.loss_weight("p2", LEVELS), GOLDEN["p2_weight"])
    moved = diffusion.loss_weight("p2", torch.tensor([-2 * math.log(4)]), shift=4.0)
    torch.testing.assert_close(moved, torch.tensor([0.5]))
    torch.testing.assert_close(diffusion.loss_weight("constant", LEVELS), torch.ones(21))


@pytest.mark.parametrize("name", diffusion.TARGETS)
@pytest.mark.parametrize("log_snr", [-9.2, -3.0, 0.0, 3.0, 9.2])
def test_a_perfect_prediction_gives_back_the_latent_and_the_noise(name, log_snr):
    generator = torch.Generator().manual_seed(0)
    x0, epsilon = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    a, b = diffusion.signal_and_noise(torch.tensor(log_snr, dtype=torch.float64))
    target = diffusion.TARGETS[name]
    x, prediction = a * x0 + b * epsilon, target.make(x0, epsilon, a, b)
    torch.testing.assert_close(target.x0(x, prediction, a, b), x0)
    torch.testing.assert_close(target.epsilon(x, prediction, a, b), epsilon)


def test_what_each_target_predicts():
    x0, epsilon, a, b = torch.tensor(3.0), torch.tensor(5.0), torch.tensor(0.6), torch.tensor(0.8)
    made = {name: target.make(x0, epsilon, a, b).item() for name, target in diffusion.TARGETS.items()}
    assert made == pytest.approx({"epsilon": 5.0, "x0": 3.0, "v": 0.6, "rectified_flow": 2.0})


def test_noise_is_added_per_item_or_for_all():
    x0, noise = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)
    levels = torch.tensor([0.0, 50.0])
    torch.testing.assert_close(diffusion.add_noise(x0, noise, levels).flatten(), torch.tensor([8 / 2**0.5, 3.0]))
    torch.testing.assert_close(diffusion.add_noise(x0, noise, levels[0]).flatten(), torch.full((2,), 8 / 2**0.5))


def test_training_times_cover_the_schedule():
    times = diffusion.training_times(4096, torch.Generator().manual_seed(0))
    assert times.min() >= 0.001 and times.max() <= 1
    assert times.mean().item() == pytest.approx(0.5, abs=0.02)
    assert times.min() < 0.01 and times.max() > 0.99


def test_unknown_names_and_shifts_are_refused():
    with pytest.raises(ValueError, match="no schedule 'cosin'"):
        log_snr_at(0.5, "cosin")
    with pytest.raises(ValueError, match="shift is 0"):
        log_snr_at(0.5, shift=0)
    with pytest.raises(ValueError, match="no loss weight 'p3'"):
        diffusion.loss_weight("p3", LEVELS)


class TestAdaptiveLossWeight:
    def test_one_sample_at_a_time_follows_the_reference(self):
        """The reference: 299 edges from -10 to 10, losses start at 1 and keep 0.99 of themselves."""
        weight = AdaptiveLossWeight()
        weight.update(torch.tensor([0.5]), torch.tensor([3.0]))
        weight.update(torch.tensor([0.5]), torch.tensor([2.0]))
        expected = (1 * 0.99 + 3 * 0.01) * 0.99 + 2 * 0.01
        # The edges around 0.5 are 0.4698 and 0.5369.
        inside, outside = weight(torch.tensor([0.47, 0.53])), weight(torch.tensor([0.46, 0.54, -50.0, 50.0]))
        torch.testing.assert_close(inside, torch.full((2,), 1 / expected))
        torch.testing.assert_close(outside, torch.ones(4))

    def test_several_samples_in_a_bucket_all_count(self):
        weight = AdaptiveLossWeight(beta=0.9)
        weight.update(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 4.0]))
        torch.testing.assert_close(weight(torch.tensor([0.5])), torch.tensor([1 / (0.81 + 0.19 * 3)]))

    @pytest.mark.parametrize("interpolate", [False, True])
    def test_it_learns_one_over_the_expected_loss(self, interpolate):
        weight = AdaptiveLossWeight(24, (-9.3, 9.3), beta=0.97, weight_range=(1e-3, 300), interpolate=interpolate)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            log_snr = torch.rand(64, generator=generator) * 18.6 - 9.3
            noise = torch.rand(64, generator=generator) + 0.5
            weight.update(log_snr, torch.exp(-0.2 * log_snr) * noise)
        levels = torch.linspace(-8, 8, 50)
        torch.testing.assert_close(weight(levels) * torch.exp(-0.2 * levels), torch.ones(50), rtol=0.2, atol=0)

    def test_interpolated_weights_have_no_steps(self):
        weight = AdaptiveLossWeight(3, (-1.0, 1.0), beta=0.0, interpolate=True)
        weight.update(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 4.0]))
        read = weight(torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.5, 1.0, 5.0]))
        torch.testing.assert_close(1 / read, torch.tensor([1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 4.0]))

    def test_weights_stay_in_their_range_and_broken_losses_are_left_out(self):
        weight = AdaptiveLossWeight(24, beta=0.0, weight_range=(0.5, 300))
        weight.update(torch.tensor([-5.0, 0.0, 5.0]), torch.tensor([1e-9, 100.0, float("nan")]))
        torch.testing.assert_close(weight(torch.tensor([-5.0, 0.0, 5.0])), torch.tensor([300.0, 0.5, 1.0]))

    def test_a_resumed_run_goes_on_with_the_same_weights(self):
        first, second = AdaptiveLossWeight(24), AdaptiveLossWeight(24)
        first.update(torch.tensor([1.0]), torch.tensor([9.0]))
        second.load_state_dict(first.state_dict())
        levels = torch.tensor([1.0, 7.0])
        assert second(levels).tolist() == first(levels).tolist() != [1.0, 1.0]
        with pytest.raises(ValueError, match="24 buckets, expected 300"):
            AdaptiveLossWeight().load_state_dict(first.state_dict())

    def test_settings_without_meaning_are_refused(self):
        with pytest.raises(ValueError, match="2 buckets"):
            AdaptiveLossWeight(2)
