"""Graph execution: lists, lazy inputs, blockers, hidden inputs, scheduling."""

import pytest
import torch
from host_kit import counting, graph, node

from stable_cascade_nodes.host import ExecutionBlocker, ProgressBar
from stable_cascade_nodes.nodes import runtime

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
