"""Graph execution: caching, lists, lazy inputs, blockers, hidden inputs, interruption, scheduling."""

import gc
import threading
import weakref

import pytest
import torch

from stable_cascade_nodes.host import ExecutionBlocker, Host, ProgressBar, RunInterrupted
from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.nodes import runtime

INT = ("INT", {"forceInput": True})


def node(function, required=None, returns=("*",), *, optional=None, hidden=None, **attributes):
    """A node class around `function(self, **inputs)`."""
    inputs = {"required": required or {}, "optional": optional or {}, "hidden": hidden or {}}
    return type(
        "Node",
        (),
        {
            "INPUT_TYPES": classmethod(lambda cls: inputs),
            "RETURN_TYPES": returns,
            "FUNCTION": "go",
            "CATEGORY": "test",
            "go": function,
            **attributes,
        },
    )


def show(shown):
    """An output node that appends what it is given to `shown`."""
    return node(lambda self, v: shown.append(v) or {"ui": {"v": [repr(v)]}}, {"v": ("*",)}, (), OUTPUT_NODE=True)


class Bench:
    """A host with some nodes, and everything it says."""

    def __init__(self, folder, **classes):
        self.messages = []
        self.shown = []
        self.host = Host(DataFolders(folder), lambda kind, data, client: self.messages.append((kind, data)))
        self.host.registry.add({"Show": show(self.shown), **classes})

    def run(self, prompt, **body):
        self.messages.clear()
        self.shown.clear()
        status, answer = self.host.submit({"prompt": graph(prompt), "client_id": "me", **body})
        assert status == 200, answer
        prompt_id = self.host.run_next()
        return self.host.history(prompt_id)[prompt_id]

    def executing(self):
        return [data["node"] for kind, data in self.messages if kind == "executing" and data["node"] is not None]

    def error(self):
        return next(data for kind, data in self.messages if kind == "execution_error")


def graph(nodes):
    """`{"1": ("Class", {inputs})}` in API format."""
    return {node_id: {"class_type": name, "inputs": inputs} for node_id, (name, inputs) in nodes.items()}


@pytest.fixture
def bench(tmp_path):
    return lambda **classes: Bench(tmp_path, **classes)


# Caching


def counting(calls, required=None, **attributes):
    return node(lambda self, **inputs: (calls.append(inputs) or len(calls),), required, **attributes)


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


# Lists


def test_the_shortest_list_repeats_its_last_entry(bench):
    listing = node(lambda self, n: (list(range(n)),), {"n": ("INT", {})}, OUTPUT_IS_LIST=(True,))
    pair = node(lambda self, a, b: ((a, b),), {"a": ("*",), "b": ("*",)})
    b = bench(List=listing, Pair=pair)
    b.run(
        {
            "1": ("List", {"n": 4}),
            "2": ("List", {"n": 2}),
            "3": ("Pair", {"a": ["1", 0], "b": ["2", 0]}),
            "4": ("Show", {"v": ["3", 0]}),
        }
    )
    assert b.shown == [(0, 0), (1, 1), (2, 1), (3, 1)]


def test_an_empty_list_beside_a_scalar_is_an_index_error(bench):
    empty = node(lambda self: ([],), OUTPUT_IS_LIST=(True,))
    pair = node(lambda self, a, b: ((a, b),), {"a": ("*",), "b": ("INT", {})})
    b = bench(Empty=empty, Pair=pair)
    b.run({"1": ("Empty", {}), "2": ("Pair", {"a": ["1", 0], "b": 1}), "3": ("Show", {"v": ["2", 0]})})
    assert b.error()["exception_type"] == "IndexError"
    assert b.error()["node_id"] == "2"


def test_a_node_that_takes_lists_gets_every_input_as_a_list(bench):
    listing = node(lambda self: ([1, 2],), OUTPUT_IS_LIST=(True,))
    taking = node(lambda self, a, k: ((a, k),), {"a": ("*",), "k": ("INT", {})}, INPUT_IS_LIST=True)
    b = bench(List=listing, Take=taking)
    b.run({"1": ("List", {}), "2": ("Take", {"a": ["1", 0], "k": 3}), "3": ("Show", {"v": ["2", 0]})})
    assert b.shown == [([1, 2], [3])]


def test_a_wrapped_list_reaches_the_node_as_a_constant(bench):
    b = bench()
    b.run({"1": ("Show", {"v": {"__value__": ["1", 0]}})})
    assert b.shown == [["1", 0]]


# Lazy inputs


@pytest.mark.parametrize(("switch", "skipped"), [(True, "2"), (False, "1")])
def test_a_lazy_input_runs_only_when_asked_for(bench, switch, skipped):
    lazy = ("*", {"lazy": True})

    def asks(self, sw, x=None, y=None):
        name, value = ("x", x) if sw else ("y", y)
        return [name] if value is None else []

    choose = node(
        lambda self, sw, x=None, y=None: (x if sw else y,),
        {"sw": ("BOOLEAN", {}), "x": lazy, "y": lazy},
        check_lazy_status=asks,
    )
    b = bench(A=node(lambda self: ("a",)), B=node(lambda self: ("b",)), Choose=choose)
    entry = b.run(
        {
            "1": ("A", {}),
            "2": ("B", {}),
            "3": ("Choose", {"sw": switch, "x": ["1", 0], "y": ["2", 0]}),
            "4": ("Show", {"v": ["3", 0]}),
        }
    )
    assert entry["status"]["completed"]
    assert b.shown == ["a" if switch else "b"]
    wanted = "1" if switch else "2"
    assert b.executing() == ["3", wanted, "3", "4"]
    assert skipped not in b.executing()


# Blockers


def test_a_blocker_silences_its_branch_and_no_other(bench):
    block = node(lambda self, m: (ExecutionBlocker(m or None), 5), {"m": ("STRING", {})}, ("*", "INT"))
    ran = []
    after = node(lambda self, a: ran.append(a) or (a,), {"a": ("*",)})
    prompt = {
        "2": ("After", {"a": ["1", 0]}),
        "3": ("Show", {"v": ["2", 0]}),
        "4": ("Show", {"v": ["1", 1]}),
    }
    b = bench(Block=block, After=after)
    entry = b.run({"1": ("Block", {"m": ""}), **prompt})
    assert entry["status"]["completed"]
    assert (ran, b.shown) == ([], [5])
    assert list(entry["outputs"]) == ["4"]
    assert not any(kind == "execution_error" for kind, _ in b.messages)

    entry = b.run({"1": ("Block", {"m": "turn it on"}), **prompt})
    assert entry["status"]["completed"]
    errors = [data for kind, data in b.messages if kind == "execution_error"]
    assert [(e["node_id"], e["exception_type"]) for e in errors] == [("2", "ExecutionBlocked")]
    assert "turn it on" in errors[0]["exception_message"]
    assert all(kind != "execution_error" for kind, _ in entry["status"]["messages"])


def test_a_blocker_in_a_list_stops_only_its_entry(bench):
    listing = node(lambda self: ([1, ExecutionBlocker(None), 3],), OUTPUT_IS_LIST=(True,))
    b = bench(List=listing)
    b.run({"1": ("List", {}), "2": ("Show", {"v": ["1", 0]})})
    assert b.shown == [1, 3]


def test_a_blocker_as_the_whole_result_stands_for_every_output(bench):
    block = node(lambda self: ExecutionBlocker(None), returns=("*", "*"))
    b = bench(Block=block)
    assert b.run({"1": ("Block", {}), "2": ("Show", {"v": ["1", 1]})})["status"]["completed"]
    assert b.shown == []


# Scheduling


def test_an_output_that_is_ready_runs_before_other_nodes(bench):
    step = node(lambda self, a: (a,), {"a": ("*",)})
    b = bench(A=node(lambda self: (1,)), Step=step)
    b.run(
        {
            "1": ("A", {}),
            "2": ("Step", {"a": ["1", 0]}),
            "3": ("Step", {"a": ["2", 0]}),
            "4": ("Show", {"v": ["3", 0]}),
            "5": ("Show", {"v": ["1", 0]}),
        }
    )
    assert b.executing() == ["1", "5", "2", "3", "4"]


def test_of_two_steps_the_one_next_to_an_output_runs_first(bench):
    step = node(lambda self, a, k: (a,), {"a": ("*",), "k": ("INT", {})})
    b = bench(A=node(lambda self: (1,)), Step=step)
    b.run(
        {
            "1": ("A", {}),
            "2": ("Step", {"a": ["1", 0], "k": 1}),
            "3": ("Step", {"a": ["2", 0], "k": 2}),
            "4": ("Step", {"a": ["3", 0], "k": 3}),
            "5": ("Show", {"v": ["4", 0]}),
            "6": ("Step", {"a": ["1", 0], "k": 6}),
            "7": ("Show", {"v": ["6", 0]}),
        }
    )
    assert b.executing() == ["1", "6", "7", "2", "3", "4", "5"]


def test_partial_targets_run_only_themselves(bench):
    b = bench(A=counting([]))
    b.run(
        {"1": ("A", {}), "2": ("Show", {"v": ["1", 0]}), "3": ("Show", {"v": {"__value__": [3]}})},
        partial_execution_targets=["3"],
    )
    assert b.executing() == ["3"]


# Hidden inputs, results, progress


def test_hidden_inputs(bench):
    got = {}
    hidden = {"uid": "UNIQUE_ID", "prompt": "PROMPT", "png": "EXTRA_PNGINFO", "dyn": "DYNPROMPT"}
    b = bench(A=node(lambda self, **inputs: got.update(inputs) or (1,), hidden=hidden))
    prompt = {"7": ("A", {}), "8": ("Show", {"v": ["7", 0]})}
    b.run(prompt, extra_data={"extra_pnginfo": {"workflow": {"x": 1}}})
    assert got["uid"] == "7"
    assert got["prompt"] == graph(prompt)
    assert got["png"] == {"workflow": {"x": 1}}
    assert got["dyn"].get_node("8")["class_type"] == "Show"


def test_nodes_run_without_gradients(bench):
    seen = []
    b = bench(A=node(lambda self: seen.append(torch.is_inference_mode_enabled()) or (1,)))
    b.run({"1": ("A", {}), "2": ("Show", {"v": ["1", 0]})})
    assert seen == [True]


def test_async_nodes_are_awaited(bench):
    async def go(self):
        return (42,)

    b = bench(A=node(go))
    b.run({"1": ("A", {}), "2": ("Show", {"v": ["1", 0]})})
    assert b.shown == [42]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (7, "must return a tuple of 1 outputs"),
        ({"expand": {}, "result": (1,)}, "does not expand"),
        ((), "linked to output 0 of node #1"),
    ],
)
def test_odd_results_are_explained(bench, result, words):
    b = bench(A=node(lambda self: result))
    entry = b.run({"1": ("A", {}), "2": ("Show", {"v": ["1", 0]})})
    assert entry["status"]["status_str"] == "error"
    assert words in b.error()["exception_message"]


def test_the_error_message_has_inputs_and_traceback(bench):
    def go(self, t, k):
        raise KeyError("lost")

    b = bench(T=node(lambda self: (torch.zeros(2),)), Fail=node(go, {"t": ("*",), "k": ("INT", {})}))
    b.run({"1": ("T", {}), "2": ("Fail", {"t": ["1", 0], "k": 3}), "3": ("Show", {"v": ["2", 0]})})
    error = b.error()
    assert error["current_inputs"] == {"t": ["tensor([0., 0.])"], "k": [3]}
    assert error["exception_type"] == "KeyError"
    assert any("in go" in line for line in error["traceback"])


def test_previews_travel_with_the_ids_of_their_node(bench):
    picture = object()

    def go(self):
        bar = runtime.progress(2)
        bar.update(1, picture)
        bar.update(2)
        return (1,)

    b = bench(A=node(go))
    b.run({"1": ("A", {}), "2": ("Show", {"v": ["1", 0]})})
    kinds = [kind for kind, _ in b.messages]
    first = kinds.index("preview")
    assert kinds[first - 1 : first + 2] == ["progress_state", "preview", "progress"]
    assert kinds.count("preview") == 1
    assert b.messages[first][1]["image"] == ("JPEG", picture, 512)
    assert b.messages[first][1]["node_id"] == "1"
    assert [data["value"] for kind, data in b.messages if kind == "progress"] == [1, 2]


def test_a_bar_outside_of_a_run_reports_to_nobody():
    bar = ProgressBar(3)
    bar.update(2)
    bar.update(2)
    assert bar.current == 3


def test_prompts_without_a_client_get_no_messages_about_themselves(bench):
    b = bench(A=node(lambda self: (1,)))
    entry = b.run({"1": ("A", {}), "2": ("Show", {"v": ["1", 0]})}, client_id=None)
    assert {kind for kind, _ in b.messages} == {"status", "progress_state"}
    assert [kind for kind, _ in entry["status"]["messages"]] == [
        "execution_start",
        "execution_cached",
        "execution_success",
    ]


# Interruption and the queue


def test_interrupt_stops_the_run_at_the_next_step_and_only_that_run(bench):
    steps = []

    def go(self, n):
        bar = ProgressBar(n)
        for index in range(n):
            steps.append(index)
            if index == 1:
                assert not b.host.interrupt("another prompt")
                assert b.host.interrupt()
            bar.update(1)
        return (n,)

    b = bench(Slow=node(go, {"n": ("INT", {})}))
    prompt = {"1": ("Slow", {"n": 5}), "2": ("Show", {"v": ["1", 0]})}
    entry = b.run(prompt)
    assert steps == [0, 1]
    assert entry["status"]["status_str"] == "error"
    kind, data = entry["status"]["messages"][-1]
    assert kind == "execution_interrupted"
    assert (data["node_id"], data["node_type"], data["executed"]) == ("1", "Slow", [])
    assert not b.host.interrupt()

    prompt["1"] = ("Slow", {"n": 1})
    assert b.run(prompt)["status"]["completed"]


def test_interrupt_is_seen_between_nodes_and_by_check_interrupted(bench):
    def stop(self):
        b.host.interrupt()
        with pytest.raises(RunInterrupted):
            runtime.check_interrupted()
        return (1,)

    b = bench(Stop=node(stop))
    entry = b.run({"1": ("Stop", {}), "2": ("Show", {"v": ["1", 0]})})
    assert b.shown == []
    assert entry["status"]["messages"][-1][1]["node_id"] == "2"


def test_the_queue_runs_in_order_of_number_and_front(bench):
    b = bench()

    def submit(value, **body):
        return b.host.submit({"prompt": graph({"1": ("Show", {"v": value})}), **body})[1]["prompt_id"]

    for value, body in (("a", {}), ("b", {}), ("first", {"front": True}), ("numbered", {"number": 0.5})):
        submit(value, **body)
    removed = submit("removed")
    assert b.host.remove_pending(removed)
    assert not b.host.remove_pending(removed)
    while b.host.run_next() is not None:
        pass
    assert b.shown == ["first", "a", "numbered", "b"]
    assert len(b.host.history()) == 4
    assert b.host.history("unknown") == {}


def test_a_waiting_worker_wakes_up_for_a_prompt(bench):
    b = bench()
    ran = []
    worker = threading.Thread(target=lambda: ran.append(b.host.run_next(timeout=10)))
    worker.start()
    _, answer = b.host.submit({"prompt": graph({"1": ("Show", {"v": "x"})})})
    worker.join(10)
    assert ran == [answer["prompt_id"]]


def test_the_callers_prompt_is_not_changed_but_the_stored_one_is_converted(bench):
    b = bench(A=counting([], {"k": ("INT", {})}))
    prompt = graph({"1": ("A", {"k": "7"}), "2": ("Show", {"v": ["1", 0]})})
    _, answer = b.host.submit({"prompt": prompt})
    b.host.run_next()
    assert prompt["1"]["inputs"]["k"] == "7"
    stored = b.host.history(answer["prompt_id"])[answer["prompt_id"]]["prompt"][2]
    assert stored["1"]["inputs"]["k"] == 7
