"""Recorded steps against plain ones: the same latents to the last bit, whatever steers the run."""

import gc
import warnings
from dataclasses import replace

import pytest
import torch
from attachment_kit import noise
from graphs_kit import OperatorRecorder

from stable_cascade_nodes.cascade_ops import graphs, stages
from stable_cascade_nodes.cascade_ops.acceleration import AUTO, CUDA_GRAPH
from stable_cascade_nodes.cascade_ops.attachments import AppliedControl, AppliedIPAdapter
from stable_cascade_nodes.cascade_ops.denoisers import Pictures
from stable_cascade_nodes.cascade_ops.graphs import StepGraphs
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings

STEPS = SamplingSettings(steps=4)


@pytest.fixture
def both(handles, prompts, recorder):
    """Samples Stage C or B plainly and with recorded steps: the latents after each step of both."""

    def run(handle, batch=1, seed=3, size=(128, 96), prompts=prompts, latent=None, **settings):
        pictures = settings.pop("pictures", None)
        found = []
        for acceleration in ("", CUDA_GRAPH):
            trail = []
            given = {"seed": seed, "settings": replace(STEPS, **settings)}
            given["callback"] = lambda info, trail=trail: trail.extend([info.denoised, info.latent])
            fast = replace(handle, acceleration=acceleration)
            if handle.stage == "stage_c":
                start = stages.empty_latent(handle, *size, batch)
                last = stages.sample_stage_c(fast, *prompts, start, pictures=pictures, **given)
            else:
                last = stages.sample_stage_b(fast, latent, *prompts, **given)
            found.append([*trail, last.samples])
        return found

    return run


def same(pair):
    plain, fast = pair
    assert len(plain) == len(fast)
    assert all(torch.equal(one, other) for one, other in zip(plain, fast, strict=True))
    return True


@pytest.fixture
def prior(handles, prompts):
    def make(batch=1, size=(128, 96)):
        latent = stages.empty_latent(handles["stage_c"], *size, batch)
        settings = SamplingSettings(steps=1)
        return stages.sample_stage_c(handles["stage_c"], *prompts, latent, seed=1, settings=settings)

    return make


# The same pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"sampler": "dpmpp_2m"}, {"guidance": 1.0}, {"rescale": 0.0}])
@pytest.mark.parametrize("batch", [1, 2])
def test_stage_c_in_recorded_steps(handles, both, recorder, settings, batch):
    assert same(both(handles["stage_c"], batch, **settings))
    # The first step runs plainly, the second is recorded, and this and those after it are replayed.
    assert recorder.counts == (1, 1, 3)


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0}])
def test_stage_b_in_recorded_steps(handles, both, recorder, prior, settings):
    assert same(both(handles["stage_b"], latent=prior(2), **settings))
    assert recorder.counts == (1, 1, 3)


def test_a_part_of_the_steps_without_guidance_is_a_shape_of_its_own(handles, both, recorder):
    assert same(both(handles["stage_c"], steps=6, guidance_until=0.5))
    assert recorder.counts == (2, 2, 4)


def test_halves_of_different_lengths_share_one_recording_each(handles, both, recorder, prompts):
    longer = prompts[0]._replace(hidden=torch.cat([prompts[0].hidden, prompts[0].hidden.flip(1)], dim=1))
    assert same(both(handles["stage_c"], prompts=[longer, prompts[1]]))
    assert recorder.counts == (2, 2, 6)


def test_pictures_with_weights(handles, both, recorder):
    pictures = Pictures(noise(1, 2, 24), torch.tensor([1.0, 0.5]))
    assert same(both(handles["stage_c"], 2, pictures=pictures))
    assert recorder.counts == (2, 2, 6)


@pytest.mark.parametrize("batch", [1, 2])
def test_controls_and_adapters_that_act_for_a_part_of_the_run(handles, both, recorder, controlnets, adapter, batch):
    canny, inpainting = (controlnets[kind] for kind in ("canny", "inpainting"))
    mask = noise(batch, 12, 16, seed=4)
    steered = replace(
        handles["stage_c"],
        controls=(
            AppliedControl(canny, noise(batch, 1, 96, 128), strength=0.7, start=1.0, end=0.5),
            AppliedControl(inpainting, noise(1, 4, 96, 128, seed=1)),
        ),
        ip_adapters=(
            AppliedIPAdapter(adapter, noise(batch, 1, 24, seed=2), weight=0.8, start=0.7, end=0.0, mask=mask),
        ),
    )
    assert same(both(steered, batch, steps=8))
    assert recorder.captures >= 2
    assert recorder.replays >= 5


# From run to run -----------------------------------------------------------------------------------------------


def test_another_prompt_needs_no_recording(handles, both, recorder, prompts):
    first = both(handles["stage_c"])
    others = [prompt._replace(hidden=prompt.hidden.flip(1), pooled=prompt.pooled * 0.5) for prompt in prompts]
    second = both(handles["stage_c"], prompts=others, seed=8, steps=6, shift=3.0)
    assert same(second)
    assert recorder.counts == (1, 1, 3 + 6)
    assert not torch.equal(first[1][-1], second[1][-1])
    assert same(both(handles["stage_c"]))
    assert recorder.captures == 1


def test_another_stage_c_latent_needs_no_recording(handles, both, recorder, prior):
    assert same(both(handles["stage_b"], latent=prior()))
    other = prior()
    assert same(both(handles["stage_b"], latent=replace(other, samples=other.samples.flip(-1))))
    assert recorder.counts == (1, 1, 3 + 4)


def test_an_adapter_with_another_weight_is_another_recording(handles, both, recorder, adapter):
    """The weight is a number that a recording holds."""
    for weight in (0.8, 0.4):
        applied = AppliedIPAdapter(adapter, noise(1, 1, 24), weight=weight)
        assert same(both(replace(handles["stage_c"], ip_adapters=(applied,))))
    assert recorder.captures == 2


def test_other_sizes_push_out_the_one_used_longest_ago(handles, both, recorder):
    sizes = [(128, 128), (170, 128), (128, 170), (170, 170), (213, 128)]
    assert len(sizes) == graphs.SHAPES_KEPT + 1
    for size in sizes:
        assert same(both(handles["stage_c"], size=size))
    assert recorder.captures == 5
    assert graphs.graphs_of(handles["stage_c"].module, torch.device("cpu")).shapes == graphs.SHAPES_KEPT
    assert same(both(handles["stage_c"], size=sizes[1]))
    assert recorder.captures == 5
    assert same(both(handles["stage_c"], size=sizes[0]))
    assert recorder.captures == 6


def test_runs_in_and_out_of_inference_mode_share_a_recording(handles, both, recorder):
    """ComfyUI runs nodes in it, a Python program may not."""
    with torch.inference_mode():
        assert same(both(handles["stage_c"]))
    assert same(both(handles["stage_c"], seed=4))
    with torch.inference_mode():
        assert same(both(handles["stage_c"], seed=5))
    assert recorder.captures == 1


# Lifetime ------------------------------------------------------------------------------------------------------


class Forgetful(OperatorRecorder):
    """Keeps nothing of what it ran, as a CUDA graph keeps no Python."""

    def capture(self, run):
        self.captures += 1
        result = run()
        return lambda: None, result


def test_recordings_are_freed_with_their_model(handles, recorder, monkeypatch, prompts):
    monkeypatch.setattr(graphs, "recorder_for", lambda device: Forgetful())
    module = graphs.nn.Module.__new__(type(handles["stage_c"].module))
    module.__dict__.update(handles["stage_c"].module.__dict__)
    handle = replace(handles["stage_c"], module=module, acceleration=CUDA_GRAPH)
    latent = stages.empty_latent(handle, 128, 96)
    stages.sample_stage_c(handle, *prompts, latent, seed=1, settings=STEPS)
    assert len(graphs._graphs) == 1
    del handle, module
    gc.collect()
    assert len(graphs._graphs) == 0


def test_weights_that_lie_elsewhere_are_recorded_anew(handles, both, recorder):
    module = handles["stage_c"].module
    assert same(both(handles["stage_c"]))
    bias = module.clf[1].bias
    before = bias.data
    try:
        bias.data = before.clone() + 0.1
        assert same(both(handles["stage_c"]))
        assert recorder.captures == 2
    finally:
        bias.data = before


def test_recordings_of_weights_that_left_are_freed_when_another_model_runs(handles, both, recorder, prior):
    module = handles["stage_c"].module
    assert same(both(handles["stage_c"]))
    bias = module.clf[1].bias
    before = bias.data
    try:
        bias.data = before.clone()
        assert same(both(handles["stage_b"], latent=prior()))
        assert list(graphs._graphs) == [handles["stage_b"].module]
    finally:
        bias.data = before


# What cannot be recorded ---------------------------------------------------------------------------------------


def test_a_failed_recording_is_said_once_and_changes_nothing(handles, both, recorder):
    recorder.broken = True
    with pytest.warns(
        UserWarning, match=r"operation not permitted when stream is capturing\) and runs without"
    ) as said:
        assert same(both(handles["stage_c"]))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(both(handles["stage_c"]))
    assert recorder.counts == (1, 0, 0)


def test_memory_that_runs_out_is_no_end_of_the_run(handles, both, recorder, monkeypatch):
    def full(run):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(recorder, "warm_up", full)
    with pytest.warns(UserWarning, match="out of memory"):
        assert same(both(handles["stage_c"]))


def test_a_model_in_training_is_never_recorded(handles, recorder):
    module = handles["stage_c"].module
    steps = StepGraphs(recorder)
    prepared = module.prepare(torch.tensor([0.5]), torch.zeros(1, 3, 64))
    x = noise(1, 16, 4, 4)
    module.train()
    try:
        for _ in range(3):
            result = steps.step(module, x, prepared, 0)
    finally:
        module.eval()
    assert recorder.counts == (0, 0, 0)
    assert result.requires_grad == module.clf[1].weight.requires_grad


def test_a_result_is_the_callers_own(handles, recorder):
    module = handles["stage_c"].module
    steps = StepGraphs(recorder)
    prepared = module.prepare(torch.tensor([0.9, 0.5]), torch.zeros(1, 3, 64))
    xs = [noise(1, 16, 4, 4, seed=seed) for seed in range(4)]
    results = [steps.step(module, x, prepared, seed % 2) for seed, x in enumerate(xs)]
    assert recorder.replays == 3
    for seed, (x, result) in enumerate(zip(xs, results, strict=True)):
        with torch.no_grad():
            assert torch.equal(result, module.step(x, prepared, seed % 2))


def test_auto_runs_plainly_where_windows_are_asked_for_and_says_so(handles, prompts, recorder, prior):
    from stable_cascade_nodes.cascade_ops.acceleration import acceleration_of

    fast = replace(handles["stage_b"], acceleration=AUTO)
    assert "windows" in acceleration_of(fast, windowed=True).words
    assert acceleration_of(fast, windowed=True).step is None
    with pytest.raises(ValueError, match=r"windows.*choose auto"):
        acceleration_of(replace(fast, acceleration=CUDA_GRAPH), windowed=True)
