"""What a step asks of the device: never a value back, and of the host's tensors nothing but the noise.

The networks are on PyTorch's `meta` device, which has no values to give, see `benchmarks.launches`.
"""

import pytest
import torch

from stable_cascade_nodes.benchmarks.launches import META, DeviceWork, denoiser_of, step_work
from stable_cascade_nodes.cascade_ops import diffusion
from stable_cascade_nodes.cascade_ops.denoisers import Pictures, SteppedAdapter, SteppedControl, replace
from stable_cascade_nodes.cascade_ops.diffusion import SAMPLERS, draw_noise, image_generators
from stable_cascade_nodes.cascade_ops.models import IPAdapter, StageB, StageC
from stable_cascade_nodes.cascade_ops.windows import WindowedStageB

LATENT_C, LATENT_B = (2, 16, 6, 4), (2, 4, 48, 32)
NOISY = {"ddpm", "lcm", "euler_ancestral", "dpmpp_2m_sde"}


def empty(*shape):
    return torch.empty(shape, device=META)


def on_meta(module):
    return module.to(META).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stage_c():
    widths = {"c_cond": 32, "c_hidden": [64, 64], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]], "dropout": 0.0}
    return on_meta(StageC(**widths, switch_level=[True]))


@pytest.fixture(scope="module")
def stage_b():
    depth = {"blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [2, 1]], "level_config": ["CT", "CTA"]}
    return on_meta(StageB(c_cond=32, c_hidden=[16, 64], nhead=[-1, 1], dropout=0.0, **depth))


def steered(model):
    """Stage C with two controls, of one picture and of one for each, and two IP-Adapters, one with a mask."""
    adapter = on_meta(IPAdapter(**IPAdapter.config_for(model, 24)))
    controls = [
        SteppedControl([empty(1, 64, 3, 2), None, empty(1, 64, 6, 4)], 0.5),
        SteppedControl([empty(2, 64, 6, 4)], acts=[True, True, False, False]),
    ]
    adapters = [
        SteppedAdapter(adapter, empty(2, 1, 24), 0.7, mask=empty(1, 6, 4)),
        SteppedAdapter(adapter, empty(1, 2, 24), acts=[True, True, False, False]),
    ]
    return replace(denoiser_of(model, 7), controls=controls, adapters=adapters)


def check(work, shape, copied=True):
    assert work.waits == []
    # Noise is drawn on the host, so that it does not depend on the device.
    assert work.copies == ([shape] if copied else [])
    assert work.launches.total() > 20


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_step_of_stage_c(stage_c, guidance):
    check(step_work(denoiser_of(stage_c, 7), LATENT_C, guidance), LATENT_C)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_step_of_stage_b(stage_b, guidance):
    check(step_work(denoiser_of(stage_b), LATENT_B, guidance), LATENT_B)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_every_sampler(stage_c, sampler):
    check(step_work(denoiser_of(stage_c, 7), LATENT_C, sampler=sampler), LATENT_C, sampler in NOISY)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_step_with_controls_and_adapters(stage_c, guidance):
    work = step_work(steered(stage_c), LATENT_C, guidance)
    check(work, LATENT_C)
    # What the controls add is put together once, and not in each step.
    assert "aten::repeat" not in work.launches


def test_a_step_with_weighted_pictures(stage_c):
    pictures = Pictures(empty(1, 2, stage_c.clip_img_mapper.in_features), torch.tensor([1.0, 0.5]))
    check(step_work(replace(denoiser_of(stage_c, 7), image=pictures), LATENT_C), LATENT_C)


def test_a_step_that_holds_a_part_of_the_latent(stage_c, monkeypatch):
    sample = diffusion.sample

    def masked(denoiser, x, **settings):
        mask = torch.zeros(1, 12, 8)
        mask[:, :6] = 1
        return sample(denoiser, x, clean=torch.zeros(x.shape), mask=mask, **settings)

    monkeypatch.setattr("stable_cascade_nodes.benchmarks.launches.sample", masked)
    check(step_work(denoiser_of(stage_c, 7), LATENT_C), LATENT_C)


def test_a_step_in_windows(stage_b):
    windowed = WindowedStageB(stage_b, 128)
    work = step_work(replace(denoiser_of(stage_b), model=windowed), LATENT_B)
    check(work, LATENT_B)
    assert work.launches.total() > 1.5 * step_work(denoiser_of(stage_b), LATENT_B).launches.total()


@pytest.mark.parametrize("ask", [torch.Tensor.item, torch.Tensor.cpu, bool, torch.nonzero, torch.Tensor.tolist])
def test_what_waits_for_the_device_is_seen(ask):
    with DeviceWork() as work, pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.ones(1, device=META))
    assert work.waits


def test_what_is_copied_to_the_device_is_seen():
    with DeviceWork() as work:
        torch.ones(3, 2).to(META)
        empty(3, 2) * torch.tensor(2.0)
    assert work.copies == [(3, 2)]
    assert work.launches.total() == 1


@pytest.mark.parametrize("shape", [(1, 3), (3, 4, 5, 2), (2, 16, 24, 24), (1, 1, 1, 1)])
def test_noise_is_that_of_each_generator(shape):
    """Whatever memory it is drawn into."""
    noise = draw_noise(image_generators(5, shape[0]), shape)
    for index, image in enumerate(noise):
        generator = torch.Generator().manual_seed(5 + index)
        assert torch.equal(image, torch.randn(shape[1:], generator=generator))
