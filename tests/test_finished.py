"""Pictures that Stage B has finished: taken over where nothing that goes into them changed, sampled anew elsewhere."""

import gc
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from stable_cascade_nodes.cascade_ops import finished, stages
from stable_cascade_nodes.cascade_ops.denoisers import TextCondition
from stable_cascade_nodes.cascade_ops.finished import FinishedPictures, StageBRun, fingerprint
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.selection import select
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.cascade_ops.wires import Latent

STEPS = SamplingSettings(steps=2)
# What the rest of a batch may change in a picture, as a part of the largest value: the order of sums.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def texts(handles):
    return SimpleNamespace(
        red=stages.encode_text(handles["text_encoder"], "a red circle"),
        blue=stages.encode_text(handles["text_encoder"], "a blue circle"),
        empty=stages.encode_text(handles["text_encoder"], ""),
    )


@pytest.fixture(scope="module")
def batch():
    """Six Stage C latents."""
    samples = torch.randn(6, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    return Latent(samples, 100, 60)


@pytest.fixture
def run(batch, texts):
    return StageBRun(batch, texts.red, texts.empty, 5, STEPS)


@pytest.fixture
def sampled(monkeypatch):
    """The numbers in their batch of the pictures that were sampled, one list per run."""
    seen, real = [], finished.sample_stage_b

    def counted(handle, latent, *arguments, **named):
        seen.append(list(latent.batch_index or range(len(latent.samples))))
        return real(handle, latent, *arguments, **named)

    monkeypatch.setattr(finished, "sample_stage_b", counted)
    return seen


def choose(run, *indexes):
    return replace(run, latent=select(run.latent, indexes))


def sample(kept, handle, run, **calls):
    return kept.plan(handle, run).sample(handle, **calls)


def same(found, wanted):
    """Two latents for the same pictures, equal but for rounding; everything else is the same."""
    assert (found.samples - wanted.samples).abs().max() < ROUNDING * wanted.samples.abs().max()
    assert replace(found, samples=None) == replace(wanted, samples=None)


# Another choice ------------------------------------------------------------------------------------------------


def test_only_what_is_new_in_the_choice_is_sampled(handles, run, sampled):
    kept = FinishedPictures()
    for choice, new in (((0, 3), [0, 3]), ((0, 3, 5), [5]), ((5, 1, 0), [1]), ((3, 0), None), ((4, 2), [4, 2])):
        sampled.clear()
        chosen = choose(run, *choice)
        found = sample(kept, handles["stage_b"], chosen)
        assert sampled == ([new] if new else [])
        same(found, chosen.sample(handles["stage_b"]))
        assert found.batch_index == choice


def test_kept_pictures_are_equal_to_the_last_bit(handles, run):
    kept = FinishedPictures()
    first = sample(kept, handles["stage_b"], choose(run, 1, 4))
    second = sample(kept, handles["stage_b"], choose(run, 4, 0, 1))
    assert torch.equal(second.samples[[2, 0]], first.samples)
    again = sample(kept, handles["stage_b"], choose(run, 4, 0, 1))
    assert torch.equal(again.samples, second.samples)


def test_a_first_run_is_the_run_without_any_of_this(handles, run):
    for chosen in (run, choose(run, 2)):
        direct = stages.sample_stage_b(
            handles["stage_b"], chosen.latent, run.positive, run.negative, seed=run.seed, settings=run.settings
        )
        found = sample(FinishedPictures(), handles["stage_b"], chosen)
        assert torch.equal(found.samples, direct.samples)
        assert replace(found, samples=None) == replace(direct, samples=None)


def test_a_start_and_masks_are_chosen_with_their_pictures(handles, run, sampled):
    start = replace(run.sample(handles["stage_b"]), mask=torch.rand(6, 1, 16, 26))
    changed = replace(run, settings=replace(STEPS, start=0.6), seed=9)
    kept = FinishedPictures()
    for choice in ((0, 3), (3, 5, 0)):
        chosen = replace(choose(changed, *choice), start_latent=select(start, choice))
        same(sample(kept, handles["stage_b"], chosen), chosen.sample(handles["stage_b"]))
    # The wish itself, too, goes through the counter.
    assert sampled == [[0, 1, 2, 3, 4, 5], [0, 3], [0, 3], [5], [3, 5, 0]]


def test_one_start_serves_every_choice(handles, run, sampled):
    start = choose(run, 2).sample(handles["stage_b"])
    changed = replace(run, settings=replace(STEPS, start=0.6), start_latent=start)
    kept = FinishedPictures()
    for choice in ((1,), (1, 4)):
        same(
            sample(kept, handles["stage_b"], choose(changed, *choice)),
            choose(changed, *choice).sample(handles["stage_b"]),
        )
    assert sampled == [[2], [1], [1], [4], [1, 4]]


def test_texts_of_each_picture_are_chosen_with_it(handles, run, texts, sampled):
    each = TextCondition(*(torch.cat(pair) for pair in zip(texts.red, texts.blue, strict=True)))
    both = replace(choose(run, 0, 3), positive=each)
    kept = FinishedPictures()
    sample(kept, handles["stage_b"], replace(choose(run, 0), positive=texts.red))
    same(sample(kept, handles["stage_b"], both), both.sample(handles["stage_b"]))
    assert sampled[:2] == [[0], [3]]


# What counts ---------------------------------------------------------------------------------------------------

CHANGES = {
    ("run", "positive"): lambda run, texts: replace(run, positive=texts.blue),
    ("run", "negative"): lambda run, texts: replace(run, negative=texts.blue),
    ("run", "seed"): lambda run, texts: replace(run, seed=6),
    ("run", "start_latent"): lambda run, texts: replace(run, start_latent=Latent(torch.zeros(1, 4, 16, 26))),
    ("latent", "samples"): lambda run, texts: replace(run.latent, samples=run.latent.samples * (1 + 1e-6)),
    ("latent", "width"): lambda run, texts: replace(run.latent, width=101),
    ("latent", "height"): lambda run, texts: replace(run.latent, height=61),
    ("latent", "mask"): lambda run, texts: replace(run.latent, mask=torch.ones(1, 1, 2, 3)),
    ("latent", "batch_index"): lambda run, texts: replace(run.latent, batch_index=(8, 9)),
    ("latent", "family"): lambda run, texts: replace(run.latent, family="release"),
    ("latent", "compression"): lambda run, texts: replace(run.latent, compression=40.0),
}
SETTINGS = {
    "steps": 3,
    "guidance": 1.7,
    "shift": 1.3,
    "sampler": "ddim",
    "start": 0.9,
    "end": 0.1,
    "guidance_end": 1.1,
    "guidance_from": 0.9,
    "guidance_until": 0.1,
    "rescale": 0.6,
    "rescale_over": "batch",
    "start_noise": "reference",
    "window": 64,
    "window_overlap": 8,
}
START_LATENT = ("samples", "mask", "width", "height", "family", "compression")


def test_every_field_is_named_here():
    """A field that is added makes this fail: give it a change below which a picture is sampled anew."""
    named = {name: {field for kind, field in CHANGES if kind == name} for name in ("run", "latent")}
    assert named["run"] | {"latent", "settings"} == {field.name for field in fields(StageBRun)}
    assert named["latent"] == {field.name for field in fields(Latent)}
    assert {*START_LATENT, "batch_index"} == {field.name for field in fields(Latent)}
    assert SETTINGS.keys() == {field.name for field in fields(SamplingSettings)}


@pytest.mark.parametrize("change", CHANGES, ids=".".join)
def test_another_input_is_sampled_anew(handles, run, texts, change):
    chosen = choose(run, 0, 3)
    made = CHANGES[change](chosen, texts)
    other = replace(chosen, latent=made) if change[0] == "latent" else made
    assert_anew(handles["stage_b"], chosen, other)


@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_is_sampled_anew(handles, run, name):
    assert getattr(STEPS, name) != SETTINGS[name]
    chosen = choose(run, 0, 3)
    assert_anew(handles["stage_b"], chosen, replace(chosen, settings=replace(STEPS, **{name: SETTINGS[name]})))


@pytest.mark.parametrize("name", START_LATENT)
def test_another_start_is_sampled_anew(handles, run, texts, name):
    start = Latent(torch.zeros(2, 4, 16, 26), 100, 60, torch.ones(1, 1, 16, 26))
    other = {
        "samples": torch.full((2, 4, 16, 26), 1e-9),
        "mask": torch.zeros(1, 1, 16, 26),
        "width": 101,
        "height": 61,
        "family": "tiny",
        "compression": 40.0,
    }
    chosen = replace(choose(run, 0, 3), start_latent=start)
    changed = replace(chosen, start_latent=replace(start, **{name: other[name]}))
    assert_anew(handles["stage_b"], chosen, changed)


def assert_anew(handle, first, other):
    kept = FinishedPictures()
    sample(kept, handle, first)
    assert kept.plan(handle, first).missing == []
    assert kept.plan(handle, other).missing == [0, 1]
    # And what was kept before is not lost.
    assert kept.plan(handle, first).missing == []


def test_a_change_of_one_picture_leaves_the_other(handles, run, texts):
    chosen = choose(run, 0, 3)
    kept = FinishedPictures()
    sample(kept, handles["stage_b"], chosen)
    samples = chosen.latent.samples.clone()
    samples[1] += 1
    plan = kept.plan(handles["stage_b"], replace(chosen, latent=replace(chosen.latent, samples=samples)))
    assert plan.missing == [1] and list(plan.kept) == [0]


def test_another_model_with_the_same_weights_is_another(handles, small_family, run):
    kept = FinishedPictures()
    sample(kept, handles["stage_b"], run)
    other = load_stage(small_family.paths["stage_b"], "stage_b")
    assert kept.plan(other, run).missing == list(range(6))
    assert kept.plan(replace(handles["stage_b"]), run).missing == list(range(6))


def test_a_model_that_is_gone_is_not_held_and_no_later_one_is_taken_for_it(small_family, run):
    kept = FinishedPictures()
    model = load_stage(small_family.paths["stage_b"], "stage_b")
    sample(kept, model, run)
    weights = [id(model)]
    del model
    gc.collect()
    assert kept._handle() is None, weights
    assert kept.plan(load_stage(small_family.paths["stage_b"], "stage_b"), run).missing == list(range(6))


def test_pictures_rescaled_together_are_sampled_together(handles, run, sampled):
    together = replace(run, settings=replace(STEPS, rescale_over="batch", guidance=2.0))
    kept = FinishedPictures()
    for _ in range(2):
        found = sample(kept, handles["stage_b"], choose(together, 0, 3))
        assert torch.equal(found.samples, choose(together, 0, 3).sample(handles["stage_b"]).samples)
    assert sampled == [[0, 3]] * 4


def test_a_value_of_another_node_that_cannot_be_compared_is_sampled_each_time(handles, run, sampled):
    odd = replace(run, latent=replace(run.latent, width=object()))
    kept = FinishedPictures()
    assert kept.plan(handles["stage_b"], odd).missing == list(range(6))
    with pytest.raises(TypeError, match="object cannot be compared"):
        fingerprint(odd)


# Interruption, errors and memory -------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_nothing_new_and_loses_nothing(handles, run, sampled):
    kept = FinishedPictures()
    sample(kept, handles["stage_b"], choose(run, 0))

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(kept, handles["stage_b"], choose(run, 0, 2), callback=stop)
    assert kept.plan(handles["stage_b"], choose(run, 0, 2)).missing == [1]
    same(sample(kept, handles["stage_b"], choose(run, 0, 2)), choose(run, 0, 2).sample(handles["stage_b"]))
    assert sampled == [[0], [2], [2], [0, 2]]


def test_what_is_refused_is_refused_beside_kept_pictures(handles, run):
    kept = FinishedPictures()
    sample(kept, handles["stage_b"], choose(run, 0, 1))
    three = torch.cat([run.positive.pooled] * 2)
    with pytest.raises(ValueError, match=r"batch of 1 or 3"):
        sample(kept, handles["stage_b"], replace(choose(run, 0, 1, 2), positive=run.positive._replace(pooled=three)))
    with pytest.raises(ValueError, match="6 pictures and its batch_index 2 numbers"):
        kept.plan(handles["stage_b"], replace(run, latent=replace(run.latent, batch_index=(0, 1))))


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(handles, run):
    each = 4 * 16 * 26 * 4
    kept = FinishedPictures(limit=3 * each)
    for choice in ((0, 1), (2,), (0,), (3,)):
        sample(kept, handles["stage_b"], choose(run, *choice))
    assert [kept.plan(handles["stage_b"], choose(run, n)).missing for n in range(4)] == [[], [0], [], []]
    sample(kept, handles["stage_b"], run)
    assert kept.plan(handles["stage_b"], run).missing == [0, 1, 2]
    held = {latent.samples.untyped_storage().nbytes() for latent in kept._kept.values()}
    assert held == {each}


def test_results_are_not_those_that_are_kept(handles, run):
    """Who changes a result in place changes nothing that is kept."""
    kept = FinishedPictures()
    first = sample(kept, handles["stage_b"], choose(run, 0))
    before = first.samples.clone()
    first.samples.zero_()
    second = sample(kept, handles["stage_b"], choose(run, 0))
    assert torch.equal(second.samples, before)
    second.samples.zero_()
    assert torch.equal(sample(kept, handles["stage_b"], choose(run, 0)).samples, before)
