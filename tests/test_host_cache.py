"""What a run of a graph takes over from the run before."""

import gc
import weakref

import pytest
from host_kit import counting, node


def test_a_changed_constant_reruns_a_node_and_what_hangs_on_it(bench):
    first, second = [], []
    b = bench(A=counting(first, {"k": ("INT", {})}), B=counting(second, {"a": ("*",)}))
    prompt = {"1": ("A", {"k": 1}), "2": ("B", {"a": ["1", 0]}), "3": ("Show", {"v": ["2", 0]})}
    b.run(prompt)
    b.run(prompt)
    assert (len(first), len(second)) == (1, 1)
    prompt["1"] = ("A", {"k": 2})
    b.run(prompt)
    assert (len(first), len(second)) == (2, 2)


@pytest.mark.parametrize("value", [float("nan"), {"__value__": [1, float("nan")]}])
def test_nan_equals_nothing(bench, value):
    calls = []
    b = bench(A=counting(calls, {"k": ("ANY", {})}))
    prompt = {"1": ("A", {"k": value}), "2": ("Show", {"v": ["1", 0]})}
    b.run(prompt)
    b.run(prompt)
    assert len(calls) == 2


def test_an_unhashable_is_changed_equals_nothing_and_nan_neither(bench):
    for answer in (object(), float("nan")):
        calls = []
        b = bench(A=counting(calls, IS_CHANGED=classmethod(lambda cls, answer=answer: answer)))
        prompt = {"1": ("A", {}), "2": ("Show", {"v": ["1", 0]})}
        b.run(prompt)
        b.run(prompt)
        assert len(calls) == 2


def test_one_and_true_and_one_point_zero_are_different_constants(bench):
    calls = []
    b = bench(A=counting(calls, {"k": ("ANY", {})}))
    for value in (1, True, 1.0):
        b.run({"1": ("A", {"k": value}), "2": ("Show", {"v": ["1", 0]})})
    assert [type(call["k"]) for call in calls] == [int, bool, float]


def test_is_changed_gets_constants_only(bench):
    asked = []
    changed = classmethod(lambda cls, **inputs: asked.append(inputs) or 0)
    b = bench(A=counting([], {"k": ("INT", {})}), B=counting([], {"a": ("*",), "k": ("INT", {})}, IS_CHANGED=changed))
    b.run({"1": ("A", {"k": 5}), "2": ("B", {"a": ["1", 0], "k": 7}), "3": ("Show", {"v": ["2", 0]})})
    assert asked == [{"k": 7}]


def test_a_failing_is_changed_runs_the_node_each_time(bench):
    calls = []
    b = bench(A=counting(calls, IS_CHANGED=classmethod(lambda cls: 1 / 0)))
    prompt = {"1": ("A", {}), "2": ("Show", {"v": ["1", 0]})}
    assert b.run(prompt)["status"]["completed"]
    b.run(prompt)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("attributes", "runs"),
    [({}, 1), ({"NOT_IDEMPOTENT": True}, 2), ({"hidden": {"uid": "UNIQUE_ID"}}, 2), ({"hidden": {"p": "PROMPT"}}, 1)],
)
def test_twins_run_once_unless_the_node_id_matters(bench, attributes, runs):
    calls = []
    b = bench(A=counting(calls, **attributes))
    b.run(
        {
            "1": ("A", {}),
            "2": ("A", {}),
            "3": ("Show", {"v": ["1", 0]}),
            "4": ("Show", {"v": ["2", 0]}),
        }
    )
    assert len(calls) == runs


def test_the_cache_keeps_only_the_current_prompt(bench):
    calls = []
    b = bench(A=counting(calls, {"k": ("INT", {})}))
    for value in (1, 2, 1):
        b.run({"1": ("A", {"k": value}), "2": ("Show", {"v": ["1", 0]})})
    assert [call["k"] for call in calls] == [1, 2, 1]


def test_outputs_of_an_earlier_prompt_are_freed(bench):
    class Big:
        pass

    made = []

    def make(self, k):
        big = Big()
        made.append(weakref.ref(big))
        return (big,)

    b = bench(
        A=node(make, {"k": ("INT", {})}), Drop=node(lambda self, a: {"ui": {}}, {"a": ("*",)}, (), OUTPUT_NODE=True)
    )
    for value in (1, 2):
        b.run({"1": ("A", {"k": value}), "2": ("Drop", {"a": ["1", 0]})})
    gc.collect()
    assert [reference() is None for reference in made] == [True, False]


def test_node_objects_live_by_id_and_class(bench):
    def go(self, k):
        self.seen = [*getattr(self, "seen", []), k]
        return (list(self.seen),)

    b = bench(A=node(go, {"k": ("INT", {})}), B=node(go, {"k": ("INT", {})}))

    def seen(node_id, name, k):
        b.run({node_id: (name, {"k": k}), "9": ("Show", {"v": [node_id, 0]})})
        return b.shown[-1]

    assert seen("1", "A", 1) == [1]
    assert seen("1", "A", 2) == [1, 2]
    assert seen("1", "B", 3) == [3]
    assert seen("1", "A", 4) == [4]
    assert seen("2", "A", 5) == [5]


def test_finished_nodes_stay_cached_when_a_later_one_fails(bench):
    calls, fails = [], [True]
    failing = node(lambda self, a: (a,) if not fails else (_ for _ in ()).throw(ValueError("no")), {"a": ("*",)})
    b = bench(A=counting(calls), Fail=failing)
    prompt = {"1": ("A", {}), "2": ("Fail", {"a": ["1", 0]}), "3": ("Show", {"v": ["2", 0]})}
    entry = b.run(prompt)
    assert entry["status"]["status_str"] == "error"
    assert b.error()["executed"] == ["1"]
    fails.clear()
    assert b.run(prompt)["status"]["completed"]
    assert len(calls) == 1


def test_a_long_chain_needs_no_recursion(bench):
    b = bench(A=node(lambda self: (0,)), Next=node(lambda self, a: (a + 1,), {"a": ("*",)}))
    length = 1500  # past the interpreter's own limit
    prompt = {"0": ("A", {})}
    for index in range(1, length + 1):
        prompt[str(index)] = ("Next", {"a": [str(index - 1), 0]})
    b.run({**prompt, "end": ("Show", {"v": [str(length), 0]})})
    assert b.shown == [length]
