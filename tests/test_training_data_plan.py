"""The order of a run is a fixed function of its seed, whoever asks for which part of it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops.training.data.plan import Plan

BUCKETS = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(lambda sizes: [list(range(size)) for size in sizes])


def a_pass(plan, batch, turn=0):
    """``(bucket, picture)`` of every sample of a pass."""
    steps = plan.steps_in_a_pass(batch)
    shown = []
    for step in range(turn * steps, (turn + 1) * steps):
        bucket, choices = plan.choose(step, batch, range(batch))
        shown += [(bucket, choice.index) for choice in choices]
    return shown


@given(BUCKETS, st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 3))
def test_a_pass_shows_everything_and_fills_up_evenly(buckets, batch, seed, turn):
    counts = Counter(a_pass(Plan(seed, buckets), batch, turn))
    assert len(counts) == len(Plan(seed, buckets)) == sum(map(len, buckets))
    for number, bucket in enumerate(buckets):
        shown = [counts[number, picture] for picture in bucket]
        assert max(shown) - min(shown) <= 1
        assert sum(shown) == -(-len(bucket) // batch) * batch


def test_repeats_are_shown_as_often_as_they_say():
    counts = Counter(a_pass(Plan(0, [[0, 1, 1, 1]]), 2))
    assert counts == {(0, 0): 1, (0, 1): 3}


@given(BUCKETS, st.integers(2, 8), st.integers(0, 2**40), st.data())
def test_any_split_over_processes_gives_the_same_samples(buckets, batch, seed, data):
    share = data.draw(st.sampled_from([0.0, 0.25, 0.5]))
    step = data.draw(st.integers(0, 50))
    positions = data.draw(st.permutations(range(batch)))
    cut = data.draw(st.integers(1, batch - 1))
    priors = [3] * len(buckets)
    whole = Plan(seed, buckets, share, priors).choose(step, batch, range(batch))
    parts = [
        Plan(seed, buckets, share, priors).choose(step, batch, part) for part in (positions[:cut], positions[cut:])
    ]
    assert [bucket for bucket, _ in parts] == [whole[0]] * 2
    for position, choice in zip(positions, parts[0][1] + parts[1][1], strict=True):
        assert choice == whole[1][position]


def test_steps_may_be_asked_for_in_any_order():
    plan = Plan(3, [list(range(5)), list(range(4))])
    forth = [plan.choose(step, 2, [0, 1]) for step in range(20)]
    assert forth == [plan.choose(step, 2, [0, 1]) for step in reversed(range(20))][::-1]
    assert forth == [Plan(3, plan.pictures).choose(step, 2, [0, 1]) for step in range(20)]


def test_passes_and_seeds_differ():
    buckets = [list(range(30))]
    orders = [a_pass(Plan(seed, buckets), 3, turn) for seed, turn in ((0, 0), (0, 1), (1, 0))]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("batch", "share"), [(1, 0.5), (1, 0.25), (4, 0.5), (4, 0.3), (8, 0.75)])
def test_prior_latents_have_their_share_of_the_samples(batch, share):
    plan = Plan(0, [list(range(8))], share, [5])
    choices = [choice for step in range(300) for choice in plan.choose(step, batch, range(batch))[1]]
    prior = [choice.index for choice in choices if choice.prior]
    assert len(prior) == pytest.approx(share * len(choices), abs=1)
    assert set(prior) == set(range(5))
    real = Counter(choice.index for choice in choices if not choice.prior)
    # Pictures come evenly still; exactly so where each step has as many.
    exact = batch == 1 or batch * share % 1 in (0, 1)
    assert len(real) == 8 and max(real.values()) <= (min(real.values()) + 1 if exact else 1.2 * min(real.values()))


def test_captions_and_crops_are_drawn_evenly_and_apart():
    plan = Plan(0, [[0]])
    drawn = [plan.choose(step, 1, [0])[1][0] for step in range(400)]
    for values in zip(*((c.caption, c.across, c.down) for c in drawn), strict=True):
        assert 0.4 < sum(values) / len(values) < 0.6 and 0 <= min(values) < 0.1 and 0.9 < max(values) < 1
    assert len({(c.caption, c.across, c.down) for c in drawn}) == 400
