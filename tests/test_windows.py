"""Stage B in windows against Stage B as a whole."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import randomised
from hypothesis import given
from hypothesis import strategies as st
from memory_kit import Peak

from stable_cascade_nodes.cascade_ops import memory, stages
from stable_cascade_nodes.cascade_ops.denoisers import StageBDenoiser
from stable_cascade_nodes.cascade_ops.models import StageB
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.cascade_ops.windows import WindowedStageB, windows_of
from stable_cascade_nodes.cascade_ops.wires import Latent

CONFIG = {
    "c_cond": 32,
    "c_hidden": [16, 64],
    "nhead": [-1, 1],
    "blocks": [[1, 1], [1, 1]],
    "block_repeat": [[1, 1], [1, 1]],
    "level_config": ["CT", "CTA"],
    "c_clip": 32,
    "dropout": 0.0,
}
BLOCK = 2  # tokens of 8 pixels that make one of the lowest level


@pytest.fixture(scope="module")
def model():
    return randomised(StageB(**CONFIG), 2)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Where they lie ----------------------------------------------------------------------------------------------------


@given(tokens=st.tuples(st.integers(1, 80), st.integers(1, 80)), blocks=st.integers(2, 20), overlap=st.integers(0, 200))
def test_windows_cover_everything_and_weigh_one(model, tokens, blocks, overlap):
    window = blocks * BLOCK * 8
    overlap = min(overlap, blocks // 2 * BLOCK * 8)
    windows = windows_of(model, [2 * length for length in tokens], window, overlap)
    least = -(-(overlap or window // 4) // 16) * BLOCK
    for parts, length in zip(windows, tokens, strict=True):
        total = torch.zeros(length)
        for part in parts:
            assert len(part.weights) == part.tokens.stop - part.tokens.start <= blocks * BLOCK
            assert part.tokens.start % BLOCK == 0 and (part.weights > 0).all()
            total[part.tokens] += part.weights
        assert torch.allclose(total, torch.ones(length))
        for one, other in pairwise(parts):
            assert one.tokens.stop - other.tokens.start >= min(least, length - other.tokens.start)
            # Gentle: no token weighs much more than its neighbour.
            assert one.weights.diff().abs().max() < 2.4 / least
        assert parts[0].tokens.start == 0 and parts[-1].tokens.stop == length
        assert len(parts) > 1 or length <= blocks * BLOCK
    assert windows.total == len(windows.rows) * len(windows.columns)


def test_a_picture_that_fits_is_one_window(model):
    for window in (0, 96, 4096):
        windows = windows_of(model, (16, 24), window)
        assert windows.total == 1 and windows.largest == (8, 12)
    assert windows_of(model, (16, 24), 64).total == 2


def test_windows_that_cannot_be_are_refused(model):
    for window, overlap, message in (
        (31, 0, "A window of 31 pixels was asked for, expected 0 .* at least 32"),
        (-64, 0, "A window of -64 pixels"),
        (64, 48, r"Windows of 64 pixels are to overlap by 48, expected 16 to 32, half of a window"),
        (64, -16, "overlap by -16"),
        (0, 16, "overlap by 16 pixels and there are none: set window"),
    ):
        with pytest.raises(ValueError, match=message):
            windows_of(model, (64, 64), window, overlap)


# What they predict -------------------------------------------------------------------------------------------------


class Local(StageB):
    """Predicts each token from itself and its condition alone: windows change nothing."""

    def step(self, x, prepared, index, control=None, inner=None):
        added = prepared.added[..., :4].permute(0, 3, 1, 2)
        return x * 0.5 + F.interpolate(added, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("size", [(40, 64), (38, 30)], ids=str)
def test_each_window_reads_its_own_part_of_the_stage_c_latent(size):
    local = randomised(Local(**CONFIG), 3)
    x, effnet, clip = noise(2, 4, *size), noise(2, 16, 5, 8, seed=1), noise(2, 1, 32, seed=2)
    times = torch.tensor([0.5])
    with torch.no_grad():
        whole = local.step(x, local.prepare(times, effnet, clip, size), 0)
        windowed = WindowedStageB(local, 64, 32)
        prepared = windowed.prepare(times, effnet, clip, size)
        assert prepared.windows.total > 3
        assert torch.allclose(windowed.step(x, prepared, 0), whole, atol=1e-5)
        half = windowed.step(x[1:], prepared.narrow(1, 1), 0)
        assert torch.allclose(half, whole[1:], atol=1e-5)


def test_windows_are_conditions_of_the_real_model(model):
    """A window in the middle of one part is predicted as the model does for that part of a larger picture."""
    x, effnet, clip = noise(1, 4, 16, 40), noise(1, 16, 2, 5, seed=1), noise(1, 1, 32, seed=2)
    times = torch.tensor([0.5])
    with torch.no_grad():
        windowed = WindowedStageB(model, 64, 16)
        prepared = windowed.prepare(times, effnet, clip, (16, 40))
        found = windowed.step(x, prepared, 0)
        first = prepared.windows.columns[0]
        assert [part.tokens for part in prepared.windows.columns] == [slice(0, 8), slice(6, 14), slice(12, 20)]
        added = model.token_condition(model.on_tokens(effnet, (8, 20))[..., :8])
        alone = model.step(x[..., :16], replace(model.prepare_text(times, clip), added=added), 0)
        assert torch.allclose(found[..., :12], alone[..., :12], atol=1e-5)
        assert first.weights[5] == 1 and first.weights[6] < 1


# The stage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(handles):
    red, empty = (stages.encode_text(handles["text_encoder"], text) for text in ("a red circle", ""))
    return red, empty


@pytest.fixture
def run(handles, texts):
    def run(latent=None, **settings):
        latent = Latent(noise(1, 16, 3, 5), width=200, height=104) if latent is None else latent
        options = {key: settings.pop(key) for key in ("start_latent", "before_window", "callback") if key in settings}
        chosen = replace(SamplingSettings(steps=2, guidance=1.5), **settings)
        return stages.sample_stage_b(handles["stage_b"], latent, *texts, seed=4, settings=chosen, **options).samples

    return run


def test_a_window_as_large_as_the_picture_changes_nothing(run):
    assert torch.equal(run(window=208), run())
    assert not torch.equal(run(window=64), run())
    assert not torch.allclose(run(window=64, window_overlap=32), run(window=64), rtol=1e-3)


def test_guidance_and_batches_work_in_windows(run):
    plain, strong = run(window=64), run(window=64, guidance=3.0)
    assert not torch.allclose(plain, strong, rtol=1e-3)
    assert not torch.allclose(run(window=64, guidance=1.0), plain, rtol=1e-3)
    pair = Latent(noise(1, 16, 3, 5).repeat(2, 1, 1, 1), width=200, height=104)
    assert torch.allclose(run(pair, window=64)[:1], plain, atol=1e-3)


def test_masks_and_starts_work_in_windows(run):
    first = Latent(run(), width=200, height=104)
    held = replace(first, mask=torch.zeros(1, 1, 26, 50))
    assert torch.equal(run(start_latent=held, window=64), first.samples)
    held.mask[..., 20:30] = 1
    painted = run(start_latent=held, window=64)
    assert torch.equal(painted[..., :20], first.samples[..., :20])
    assert not torch.allclose(painted[..., 20:30], first.samples[..., 20:30], rtol=1e-2)
    refined = run(start_latent=first, start=0.2, window=64)
    assert 0 < (refined - first.samples).abs().mean() < (run(window=64) - noise(1, 4, 26, 50)).abs().mean()


def test_every_window_of_every_step_can_end_the_run(run):
    seen = []
    run(window=64, before_window=lambda: seen.append(0))
    assert len(seen) == 2 * 2 * 4

    def stop():
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run(window=64, before_window=stop)
    assert seen == [1] * 3


def test_stage_c_has_no_windows(handles, texts):
    latent = stages.empty_latent(handles["stage_c"])
    settings = SamplingSettings(steps=1, window=64)
    with pytest.raises(ValueError, match=r"A window of 64 pixels was asked for Stage C .* only Stage B"):
        stages.sample_stage_c(handles["stage_c"], *texts, latent, seed=0, settings=settings)


@pytest.mark.parametrize("window", [0, 128])
def test_memory_is_that_of_a_window(handles, window, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q.contiguous()))
    handle = replace(handles["stage_b"], module=randomised(StageB(**CONFIG | {"c_hidden": [64, 64]}), 2))
    size = (96, 128)
    model = WindowedStageB(handle.module, window) if window else handle.module
    denoiser = StageBDenoiser(model, noise(1, 16, 9, 12), noise(1, 1, 32), noise(1, 1, 32, seed=1))
    x = noise(1, 4, *size)
    peak = Peak(handle.module)
    with torch.no_grad(), peak:
        denoiser.prepare(torch.tensor([0.5]), x.shape, guided=True)(x, 0, True)
    largest = windows_of(handle.module, size, window).largest
    estimate = memory.sampling_bytes(handle, x.shape, 4, largest=largest)
    assert 1 < estimate / peak.most < 1.6
