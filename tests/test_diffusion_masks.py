"""The sampling loop with masks, and from a picture: what is held, and at which noise level a run begins."""

import pytest
import torch
from sampling_kit import Towards, start

from stable_cascade_nodes.cascade_ops.diffusion import (
    SAMPLERS,
    fit_mask,
    image_generators,
    log_snr_at,
    noised_start,
    sample,
    signal_and_noise,
)

# Masks


def held_run(mask, sampler="ddpm", **settings):
    generators = image_generators(0, 2)
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    denoiser = Towards(3.0)
    sampled = sample(
        denoiser,
        start(generators, 4, (8, 8)),
        steps=6,
        sampler=sampler,
        generators=generators,
        clean=clean,
        mask=mask,
        **settings,
    )
    return denoiser, sampled, clean


def half_mask():
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    return mask


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_the_clean_latent_comes_back_exactly(sampler):
    _, sampled, clean = held_run(half_mask(), sampler, shift=2.0)
    assert torch.equal(sampled.latent[..., :4], clean[..., :4])
    torch.testing.assert_close(sampled.latent[..., 4:], torch.full((2, 4, 8, 4), 3.0), rtol=0, atol=1e-2)


def test_the_model_sees_the_held_part_at_the_right_noise_level():
    denoiser, _, clean = held_run(half_mask(), t_start=0.8)
    noises = [((x - a * clean) / b)[..., :4] for x, a, b in denoiser.seen]
    assert len(noises) == 6
    assert noises[0].std().item() == pytest.approx(1, abs=0.1)
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-3)


def test_a_mask_of_zeros_keeps_everything_and_of_ones_nothing():
    _, kept, clean = held_run(torch.zeros(8, 8))
    assert torch.equal(kept.latent, clean)
    generators = image_generators(0, 2)
    vanilla = sample(Towards(3.0), start(generators, 4, (8, 8)), steps=6, generators=generators)
    _, everything, _ = held_run(torch.ones(8, 8))
    assert torch.equal(everything.latent, vanilla.latent)
    assert torch.equal(everything.noisy, vanilla.noisy)


def test_a_soft_mask_mixes():
    _, sampled, clean = held_run(torch.full((8, 8), 0.25))
    torch.testing.assert_close(sampled.latent, 0.25 * 3.0 + 0.75 * clean, rtol=0, atol=1e-2)


def test_a_soft_mask_gives_samplers_a_noise_that_fits_the_mixed_prediction():
    """Euler reads the noise and the latent, DDIM the noise and the prediction: they only agree if all three fit."""
    ddim, euler = (held_run(torch.full((8, 8), 0.25), sampler)[1].noisy for sampler in ("ddim", "euler"))
    torch.testing.assert_close(ddim, euler, rtol=1e-4, atol=1e-3)


def test_masks_are_brought_to_the_latent():
    picture = torch.zeros(1, 1, 80, 80)
    picture[..., 45:] = 1
    fitted = fit_mask(picture, (3, 16, 8, 8))
    assert fitted.shape == (3, 1, 8, 8)
    assert fitted[2, 0, 0].tolist() == [0, 0, 0, 0, 0.5, 1, 1, 1]
    assert fit_mask(torch.ones(3, 8, 8), (3, 16, 8, 8)).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"mask has the shape \(2, 8, 8\)"):
        fit_mask(torch.ones(2, 8, 8), (3, 16, 8, 8))


def test_mask_and_clean_latent_belong_together():
    for settings in ({"mask": half_mask()}, {"clean": torch.zeros(1, 4, 8, 8)}):
        with pytest.raises(ValueError, match="one is missing"):
            sample(Towards(0.0), torch.zeros(1, 4, 8, 8), steps=1, sampler="ddim", **settings)
    with pytest.raises(ValueError, match=r"latent to hold has the shape \(1, 4, 6, 6\)"):
        sample(Towards(0.0), torch.zeros(1, 4, 8, 8), steps=1, clean=torch.zeros(1, 4, 6, 6), mask=half_mask())


# Image to image


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_start_of_image_to_image_is_at_the_level_the_model_is_told(shift):
    latent, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = Towards(latent)
    sample(denoiser, noised_start(latent, noise, 0.6, shift), steps=3, sampler="ddim", shift=shift, t_start=0.6)
    x, a, b = denoiser.seen[0]
    torch.testing.assert_close(x, a * latent + b * noise, rtol=1e-4, atol=1e-5)


def test_the_reference_start_of_image_to_image_ignores_the_shift():
    latent, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    unmatched = noised_start(latent, noise, 0.8, shift=2.0, matched=False)
    assert unmatched == noised_start(latent, noise, 0.8)
    assert unmatched < noised_start(latent, noise, 0.8, shift=2.0)
    # 0.8 of the cosine schedule: a = cos(...) = 0.3066
    assert unmatched.item() == pytest.approx(0.9518, abs=1e-3)


def test_a_run_ends_where_it_is_told():
    denoiser = Towards(1.0)
    noisy = sample(denoiser, torch.zeros(1, 4, 8, 8), steps=4, sampler="ddim", t_start=0.9, t_end=0.5).noisy
    told = [signal_and_noise(log_snr_at(t))[0].item() for t in (0.9, 0.8, 0.7, 0.6)]
    assert [a.item() for _, a, _ in denoiser.seen] == pytest.approx(told, rel=1e-3)
    a, b = signal_and_noise(log_snr_at(0.5))
    x, first_a, first_b = denoiser.seen[0]
    torch.testing.assert_close(noisy, a + b * (x - first_a) / first_b, rtol=1e-3, atol=1e-4)
