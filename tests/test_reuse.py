"""Inner levels of Stage B that are reused from step to step, against those that are computed."""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import randomised
from hypothesis import given
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops import reuse, stages
from stable_cascade_nodes.cascade_ops.denoisers import TextCondition
from stable_cascade_nodes.cascade_ops.models import StageB
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.reuse import InnerReuse, Kept, ReusedSteps, reuse_inner
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.cascade_ops.windows import WindowedStageB
from stable_cascade_nodes.cascade_ops.wires import Latent

# All four levels of the release, a few channels wide.
CONFIG = {
    "c_cond": 24,
    "c_hidden": [8, 12, 16, 16],
    "nhead": [-1, -1, 1, 2],
    "blocks": [[1, 2, 1, 1], [1, 1, 2, 1]],
    "block_repeat": [[1, 1, 1, 1], [2, 1, 2, 2]],
    "c_clip": 32,
    "dropout": 0.0,
}
SETTINGS = SamplingSettings(steps=6, guidance=1.5)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return randomised(StageB(**CONFIG), 2).requires_grad_(False)


@pytest.fixture(scope="module")
def stage_b(handles, model):
    return replace(handles["stage_b"], module=model)


TEXTS = [TextCondition(noise(1, 5, 64, seed=seed), noise(1, 32, seed=seed)) for seed in (1, 2)]


def sampled(handle, latent=None, **changes):
    latent = Latent(noise(1, 16, 3, 5), width=200, height=104) if latent is None else latent
    options = {key: changes.pop(key) for key in ("start_latent", "callback", "before_window") if key in changes}
    settings = replace(SETTINGS, **changes)
    return stages.sample_stage_b(handle, latent, *TEXTS, seed=4, settings=settings, **options).samples


# Which steps ---------------------------------------------------------------------------------------------------------


def steps_of(every=2, start=1.0, end=0.0, count=6, guided=None):
    times = [1 - i / count for i in range(count)]
    marked = InnerReuse(every, 1, start, end).steps(times, guided or [True] * count)
    return "".join("-" if reused else "x" for reused in marked)


def test_one_step_in_so_many_computes():
    assert steps_of(2) == "x-x-x-"
    assert steps_of(3, count=7) == "x--x--x"
    assert steps_of(100) == "x-----"


def test_steps_outside_of_the_times_compute():
    # A step that computes serves the next, be it outside of the times itself.
    assert steps_of(2, start=0.5) == "xxx-x-"
    assert steps_of(3, end=0.5) == "x--xxx"
    assert steps_of(2, start=0.4, end=0.35) == "xxxxxx"


def test_another_number_of_halves_computes():
    assert steps_of(2, guided=[True] * 3 + [False] * 3) == "x-xx-x"
    assert steps_of(4, guided=[False, True, True, True, False, False]) == "xx--x-"


@given(
    every=st.integers(2, 5),
    limits=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3),
    guided=st.lists(st.booleans(), min_size=1, max_size=12),
)
def test_a_step_reuses_where_it_may_and_nowhere_else(every, limits, guided):
    end, start = sorted(limits)
    times = [1 - i / len(guided) for i in range(len(guided))]
    reused = InnerReuse(every, 1, start, end).steps(times, guided)
    for index, marked in enumerate(reused):
        computed = [before for before in range(index) if not reused[before]]
        may = bool(computed) and start + 1e-6 >= times[index] >= end - 1e-6
        may = may and index - computed[-1] < every and guided[computed[-1]] == guided[index]
        assert marked == may


# One step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 48), (38, 30)], ids=str)
@pytest.mark.parametrize("outer", [1, 2, 3])
@pytest.mark.parametrize("window", [0, 128])
def test_what_this_very_step_would_compute_changes_nothing(model, outer, size, window):
    """The same latent at the same level: to the last bit, however often it is taken, and in every window."""
    network = WindowedStageB(model, window) if window else model
    effnet, clip, x = noise(2, 16, 3, 4), noise(2, 1, 32, seed=1), noise(2, 4, *size, seed=3)
    prepared = network.prepare(torch.full([4], 0.5), effnet, clip, size)
    kept = Kept(ReusedSteps(outer, (False, True, True, True)))
    with torch.no_grad():
        plain = network.step(x, prepared, 0)
        for index in range(4):
            assert torch.equal(network.step(x, prepared, index, inner=kept.at(index)), plain), index
        # And the outer levels do read the latent of their own step.
        kept = Kept(ReusedSteps(outer, (False, True)))
        network.step(x, prepared, 0, inner=kept.at(0))
        other = network.step(x + 0.1, prepared, 1, inner=kept.at(1))
        assert not torch.equal(other, plain) and not torch.equal(other, network.step(x + 0.1, prepared, 1))


# A run ----------------------------------------------------------------------------------------------------------------


def counted(handle, run):
    """How often the first block of each level runs, down and up."""
    seen, levels = Counter(), len(handle.module.down_blocks)
    hooks = []
    for level in range(levels):
        blocks = {"down": handle.module.down_blocks[level][0], "up": handle.module.up_blocks[levels - 1 - level][0]}
        for way, block in blocks.items():
            hooks.append(block.register_forward_hook(lambda *_, name=(way, level): seen.update([name])))
    run()
    for hook in hooks:
        hook.remove()
    repeats = [2, 2, 1, 2]  # of the configuration, on the way up, outermost first
    return [(seen["down", level], seen["up", level] / repeats[level]) for level in range(levels)]


@pytest.mark.parametrize("outer", [1, 2, 3])
def test_inner_blocks_run_in_every_second_step(stage_b, outer):
    handle = reuse_inner(stage_b, InnerReuse(2, outer))
    assert counted(stage_b, lambda: sampled(stage_b)) == [(6, 6)] * 4
    assert counted(stage_b, lambda: sampled(handle)) == [(6, 6)] * outer + [(3, 3)] * (4 - outer)


def test_where_guidance_ends_the_inner_blocks_are_computed(stage_b):
    handle = reuse_inner(stage_b, InnerReuse(4, 1))
    # Six steps at 1, 5/6, ...: guided at the first three.
    assert counted(stage_b, lambda: sampled(handle, guidance_until=0.6)) == [(6, 6)] + [(2, 2)] * 3
    assert counted(stage_b, lambda: sampled(handle, guidance=1.0)) == [(6, 6)] + [(2, 2)] * 3
    assert counted(stage_b, lambda: sampled(handle, guidance_from=0.9, guidance_until=0.6)) == [(6, 6)] + [(3, 3)] * 3


def test_the_error_is_there_and_small_and_smaller_with_more_levels():
    family = CascadePipeline.load("tiny", device="cpu")
    texts = [stages.encode_text(family.text_encoder, text) for text in ("a small red star on a blue background", "")]
    latent = stages.empty_latent(family.stage_c)
    latent = stages.sample_stage_c(family.stage_c, *texts, latent, seed=1, settings=SamplingSettings(steps=8))

    def run(handle):
        settings = SamplingSettings(steps=10)
        return stages.sample_stage_b(handle, latent, *texts, seed=3, settings=settings).samples

    exact = run(family.stage_b)
    errors = [
        ((run(reuse_inner(family.stage_b, InnerReuse(2, outer))) - exact).square().mean() / exact.square().mean())
        ** 0.5
        for outer in (1, 2, 3)
    ]
    assert 0.3 > errors[0] > errors[1] > errors[2] > 0
    assert torch.equal(run(family.stage_b), exact)  # nothing was left in the model


def test_a_picture_does_not_depend_on_its_batch(stage_b):
    handle = reuse_inner(stage_b, InnerReuse(3, 1))
    pair = Latent(noise(2, 16, 3, 5, seed=8), width=200, height=104)
    alone = sampled(handle, replace(pair, samples=pair.samples[:1]))
    together = sampled(handle, pair)[:1]
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()
    assert not torch.allclose(alone, sampled(stage_b, replace(pair, samples=pair.samples[:1])), rtol=1e-3)


def test_windows_reuse_their_own(stage_b):
    handle, latent = reuse_inner(stage_b, InnerReuse(2, 1)), Latent(noise(1, 16, 3, 5), width=200, height=104)
    assert stages.stage_b_windows(stage_b, latent, replace(SETTINGS, window=128)).total == 3
    assert counted(stage_b, lambda: sampled(handle, latent, window=128)) == [(18, 18)] + [(9, 9)] * 3
    assert not torch.allclose(sampled(handle, window=128), sampled(stage_b, window=128), rtol=1e-3)


def test_masks_hold_and_every_step_is_reported(stage_b):
    handle, seen = reuse_inner(stage_b, InnerReuse(2, 2)), []
    first = Latent(sampled(stage_b), width=200, height=104, mask=torch.zeros(1, 1, 26, 50))
    first.mask[..., 20:30] = 1
    painted = sampled(handle, start_latent=first, callback=seen.append)
    assert torch.equal(painted[..., :20], first.samples[..., :20])
    assert not torch.equal(painted[..., 20:30], first.samples[..., 20:30])
    assert [info.step for info in seen] == list(range(6))


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "outer"), [(0, 1), (0, 3), (128, 2)])
def test_what_is_kept_is_counted_and_freed(stage_b, monkeypatch, window, outer):
    alive, most, after = set(), [], []
    real = reuse.InnerStep.keep

    def keep(self, given):
        number = len(most)
        real(self, given)
        if given is self.kept._tensors.get(self.part):
            alive.add((number, given.untyped_storage().nbytes()))
            weakref.finalize(given.untyped_storage(), alive.discard, (number, given.untyped_storage().nbytes()))
        most.append(sum(size for _, size in alive))

    monkeypatch.setattr(reuse.InnerStep, "keep", keep)
    handle = reuse_inner(stage_b, InnerReuse(2, outer, 1.0, 0.5))
    latent = Latent(noise(1, 16, 3, 6), width=256, height=128)
    sampled(handle, latent, window=window, callback=lambda info: after.append(len(alive)))
    windows = stages.stage_b_windows(handle, latent, replace(SETTINGS, window=window))
    assert max(most) == reuse.kept_bytes(handle, 1, windows)
    # Freed with the last step that takes it, long before the run ends.
    assert after == [windows.total, 0, windows.total, 0, 0, 0]
    assert reuse.kept_bytes(stage_b, 1, windows) == 0
