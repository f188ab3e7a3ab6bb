"""Interruption of a run, and the order in which prompts run."""

import threading

import pytest
from host_kit import counting, graph, node

from stable_cascade_nodes.host import ProgressBar, RunInterrupted
from stable_cascade_nodes.nodes import runtime


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
