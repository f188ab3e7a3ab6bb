"""The losses of the stages, and the fits that come after training."""

import pytest
import torch

from stable_cascade_nodes.cascade_ops.diffusion import AdaptiveLossWeight, log_snr_at, noise_cond, signal_and_noise
from stable_cascade_nodes.cascade_ops.models import LatentEncoder, Previewer, StageA
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet
from stable_cascade_nodes.cascade_ops.training.diffusion import diffusion_loss, pyramid_noise
from stable_cascade_nodes.cascade_ops.training.latent_encoder import (
    LatentBatch,
    LatentEncoderObjective,
    cell_labels,
    refit_latent_norm,
)
from stable_cascade_nodes.cascade_ops.training.stage_a import (
    LATENT_STD,
    autoencoder_loss,
    fit_codebook,
    normalize_latent,
)

ENCODER = {"widths": [8] * 8, "depths": [1] * 6}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_stage_a() -> StageA:
    torch.manual_seed(0)
    model = StageA(bottleneck_blocks=1, c_hidden=16, codebook_size=16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gammas"):
            torch.nn.init.constant_(parameter, 0.3)
    return model


def test_pyramid_noise_has_unit_variance_and_coarse_parts():
    noise = pyramid_noise((400, 1, 32, 32), generator())
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    # White noise would leave 1/1024 of the variance in the means of the pictures.
    assert noise.mean(dim=(2, 3)).var().item() > 20 / 1024


def test_pyramid_noise_uses_only_the_levels_asked_for():
    white = pyramid_noise((400, 1, 32, 32), generator(), size_range=(0, 0))
    assert torch.equal(white, torch.randn(400, 1, 32, 32, generator=generator()))


def test_diffusion_loss_of_a_perfect_and_of_a_blind_model():
    latent = torch.randn(64, 4, 8, 8, generator=generator(1))
    noise = torch.randn(latent.shape, generator=generator(2))
    weight = AdaptiveLossWeight(24, (-9.3, 9.3), interpolate=True)

    def perfect(x, r):
        # The noise condition tells the level, and with the level and the latent the noise is known.
        table = log_snr_at(torch.linspace(1, 0, 20001))
        level = table[(noise_cond(table)[None] - r[:, None]).abs().argmin(dim=1)]
        a, b = (v.view(-1, 1, 1, 1) for v in signal_and_noise(level))
        return (x - a * latent) / b

    _, figures = diffusion_loss(perfect, latent, noise, generator(3), weight)
    assert figures["mse"] < 1e-2
    before = weight.losses.clone()
    _, figures = diffusion_loss(lambda x, r: torch.zeros_like(x), latent, noise, generator(3), weight)
    assert figures["mse"] == pytest.approx(1, abs=0.05)
    assert not torch.equal(weight.losses, before)


def test_autoencoder_loss_reports_decibels_and_feels_noise():
    model = small_stage_a()
    image = torch.rand(2, 3, 16, 16, generator=generator())
    quiet, figures = autoencoder_loss(model, image, torch.zeros(2, 4, 4, 4))
    square = (model.decode(model.encode(image)[0]) - image).square().mean()
    assert figures["psnr"] == pytest.approx(-10 * square.log10().item(), rel=1e-4)
    loud, _ = autoencoder_loss(model, image, torch.randn(2, 4, 4, 4, generator=generator()) * 5)
    assert loud > quiet


@torch.no_grad()
def test_normalized_latents_have_the_published_scale_and_pictures_stay():
    model = small_stage_a()
    images = torch.rand(8, 3, 32, 32, generator=generator())
    before = model.decode(model.encode(images)[0])
    normalize_latent(model, images)
    latent = model.encode(images)[0]
    assert torch.allclose(latent.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latent.std(dim=(0, 2, 3)) * model.scale_factor, torch.full((4,), LATENT_STD), rtol=1e-3)
    assert torch.allclose(model.decode(latent), before, atol=1e-4)


@torch.no_grad()
def test_codebook_lies_where_the_latents_are():
    model = small_stage_a()
    images = torch.rand(8, 3, 32, 32, generator=generator())
    distance = [(latent - entries).square().mean() for latent, entries, _ in [model.encode(images, quantize=True)]]
    fit_codebook(model, images, generator())
    latent, entries, indices = model.encode(images, quantize=True)
    assert (latent - entries).square().mean() < 0.5 * distance[0]
    assert len(indices.unique()) > 8


def test_cell_labels_pick_what_covers_a_cell():
    labels = torch.zeros(1, 2, 16, 16, dtype=torch.long)
    labels[0, 0, :8, :8] = 3  # a whole cell
    labels[0, 0, :2, 8:12] = 2  # an eighth of a cell is not enough,
    labels[0, 1, 8:11, :8] = 1  # three eighths are
    cells = cell_labels(labels, (2, 2), [7, 10])
    assert cells.tolist() == [[[[3, 0], [0, 0]], [[0, 0], [1, 0]]]]


def test_latent_encoder_objective_trains_every_part():
    torch.manual_seed(0)
    objective = LatentEncoderObjective(LatentEncoder(**ENCODER), Previewer(c_hidden=16), [3, 4], c_decoder=16)
    labels = torch.randint(0, 3, (2, 2, 16, 16), generator=generator())
    batch = LatentBatch(torch.rand(2, 3, 64, 64, generator=generator()), labels, torch.zeros(2, 16, 2, 2))
    loss, figures = objective.loss(batch)
    loss.backward()
    assert set(figures) == {"pixels", "drawn", "cell0", "cell1"}
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_refit_norm_gives_unit_latents():
    torch.manual_seed(0)
    encoder = LatentEncoder(**ENCODER).eval()
    encoder.mapper[0].weight.mul_(1e5)  # a fresh network's features would vanish beside the norm's epsilon
    images = torch.rand(40, 3, 64, 64, generator=generator())
    refit_latent_norm(encoder, images)
    latent = encoder(normalize_imagenet(images))
    assert torch.allclose(latent.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-3)
    assert torch.allclose(latent.std(dim=(0, 2, 3)), torch.ones(16), atol=1e-2)
