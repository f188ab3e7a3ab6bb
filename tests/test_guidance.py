"""Guidance: its arithmetic, where it acts, and what is computed for it."""

import pytest
import torch

from stable_cascade_nodes.cascade_ops.diffusion import Guidance, log_snr_at, sample, signal_and_noise


class TwoAnswers:
    """Conditional and unconditional predictions that are simple functions of `x`; keeps a record of the calls."""

    def __init__(self):
        self.prepared_for_guidance = None
        self.calls = []

    def prepare(self, noise_cond, shape, guided):
        self.prepared_for_guidance = guided

        def predict(x, index, guided):
            self.calls.append(guided)
            return x.tanh(), (x * 0.5).sin() if guided else None

        return predict


def run(guidance, steps=10, **settings):
    denoiser = TwoAnswers()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    return denoiser, sample(denoiser, x, steps=steps, sampler="ddim", guidance=guidance, **settings), x


def by_hand(x, scales, rescale, over_batch):
    """The reference's loop, written out for DDIM."""
    levels = log_snr_at(torch.linspace(1, 0, len(scales) + 1))
    for index, scale in enumerate(scales):
        cond, uncond = x.tanh(), (x * 0.5).sin()
        guided = uncond + scale * (cond - uncond)
        if scale != 1:
            items = [slice(None)] if over_batch else range(len(x))
            for item in items:
                factor = cond[item].std() / guided[item].std()
                guided[item] = rescale * guided[item] * factor + (1 - rescale) * guided[item]
        a, b = signal_and_noise(levels[index])
        x0 = (x - b * guided) / a
        a, b = signal_and_noise(levels[index + 1])
        x = a * x0 + b * guided
    return x0


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("over", ["image", "batch"])
def test_constant_scale(rescale, over):
    _, sampled, x = run(Guidance(3.0, rescale=rescale, rescale_over=over))
    torch.testing.assert_close(sampled.latent, by_hand(x, [3.0] * 10, rescale, over == "batch"), rtol=1e-4, atol=1e-3)


def test_ramp_is_linear_in_time():
    guidance = Guidance((5.0, 2.0))
    assert [guidance.scale_at(t) for t in (1.0, 0.5, 0.0)] == [5.0, 3.5, 2.0]
    denoiser, sampled, x = run(guidance)
    expected = by_hand(x, [5.0 * t + 2.0 * (1 - t) for t in (i / 10 for i in range(10, 0, -1))], 0.7, False)
    torch.testing.assert_close(sampled.latent, expected, rtol=1e-4, atol=1e-3)
    assert denoiser.calls == [True] * 10


def test_interval_stops_guidance_part_way_and_saves_the_unconditional_half():
    denoiser, sampled, x = run(Guidance(3.0, interval=(0.8, 0.3)))
    # Times 1.0, 0.9, ..., 0.1; both bounds count.
    assert denoiser.calls == [False] * 2 + [True] * 6 + [False] * 2
    torch.testing.assert_close(
        sampled.latent, by_hand(x, [1.0] * 2 + [3.0] * 6 + [1.0] * 2, 0.7, False), rtol=1e-4, atol=1e-3
    )


def test_interval_works_with_a_ramp():
    guidance = Guidance((4.0, 2.0), interval=(1.0, 0.5))
    assert [guidance.scale_at(t) for t in (1.0, 0.5, 0.4)] == [4.0, 3.0, 1.0]


@pytest.mark.parametrize("guidance", [None, Guidance(1.0), Guidance((1.0, 1.0)), Guidance(4.0, interval=(0.01, 0.0))])
def test_without_guidance_the_unconditional_half_is_neither_prepared_nor_computed(guidance):
    denoiser, sampled, x = run(guidance)
    assert denoiser.prepared_for_guidance is False
    assert denoiser.calls == [False] * 10
    torch.testing.assert_close(sampled.latent, by_hand(x, [1.0] * 10, 0.7, False), rtol=1e-4, atol=1e-3)


def test_scale_zero_is_the_unconditional_prediction():
    cond, uncond = torch.randn(2, 2, 4, 4, 4)
    assert torch.equal(Guidance(0.0, rescale=0.0).combine(cond, uncond, 0.0), uncond)


def test_rescale_over_images_keeps_images_apart():
    cond, uncond = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    louder = cond.clone()
    louder[1] *= 10
    for over, independent in (("image", True), ("batch", False)):
        guidance = Guidance(4.0, rescale_over=over)
        alone, beside = guidance.combine(cond, uncond, 4.0)[0], guidance.combine(louder, uncond, 4.0)[0]
        assert torch.equal(alone, beside) is independent
    full = Guidance(4.0, rescale=1.0).combine(cond, uncond, 4.0)
    torch.testing.assert_close(full.std((1, 2, 3)), cond.std((1, 2, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (1.0, 2.0, 3.0)}, "ramp has 3 values"),
        ({"interval": (0.2, 0.8)}, "interval is"),
        ({"interval": (1.5, 0.0)}, "interval is"),
        ({"rescale": 2.0}, "rescale is 2.0"),
        ({"rescale_over": "pixels"}, "over 'pixels'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)
