"""Validation beyond the recorded answers: what ComfyUI answers with a server error, and single rules."""

import pytest

from stable_cascade_nodes.host import Host
from stable_cascade_nodes.host.folders import DataFolders
from stable_cascade_nodes.host.validation import types_match


class Source:
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT", "STRING"), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"a": ("INT", {}), "i": ("INT", {"min": 0})}}

    def go(self, **inputs):
        return (1, "x")


class Sink:
    OUTPUT_NODE, RETURN_TYPES, FUNCTION, CATEGORY = True, (), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"v": ("INT", {}), "w": ("INT", {"forceInput": True})}}

    def go(self, **inputs):
        return {"ui": {"got": [inputs]}}


class Combo(Sink):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {},
            "optional": {
                "few": (["a", "b"],),
                "many": ([str(n) for n in range(30)],),
                "new": ("COMBO", {"options": ["x", "y"]}),
                "several": ("COMBO", {"options": ["x", "y"], "multiselect": True}),
            },
        }


class Named(Sink):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"v": ("INT", {"max": 3}), "w": ("INT", {"max": 3})}}

    @classmethod
    def VALIDATE_INPUTS(cls, v):
        if v == 13:
            raise KeyError("unlucky")
        return True


class OwnTypes(Sink):
    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True if input_types == {"w": "STRING"} else f"got {input_types}"


@pytest.fixture
def host(tmp_path):
    host = Host(DataFolders(tmp_path))
    host.registry.add({"Source": Source, "Sink": Sink, "Combo": Combo, "Named": Named, "OwnTypes": OwnTypes})
    return host


def prompt(**nodes):
    return {name.lstrip("n"): {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def errors(answer, node_id):
    return [(error["type"], error["details"]) for error in answer["node_errors"][node_id]["errors"]]


def test_a_link_to_a_missing_node_is_the_clients_mistake(host):
    status, answer = host.submit({"prompt": prompt(n1=("Sink", {"v": ["9", 0]}))})
    assert status == 400
    assert answer["error"]["type"] == "prompt_outputs_failed_validation"
    assert errors(answer, "1") == [("bad_linked_input", "v, node #9")]
    assert answer["node_errors"]["1"]["dependent_outputs"] == ["1"]


def test_a_missing_node_behind_an_undeclared_input_is_found_too(host):
    status, answer = host.submit({"prompt": prompt(n1=("Sink", {"old": ["9", 0]}))})
    assert status == 400
    assert errors(answer, "1") == [("bad_linked_input", "old, node #9")]


def test_one_broken_branch_leaves_the_other_running(host):
    status, answer = host.submit({"prompt": prompt(n1=("Sink", {"v": ["9", 0]}), n2=("Sink", {"v": 1}))})
    assert status == 200
    assert list(answer["node_errors"]) == ["1"]
    ran = host.run_next()
    assert list(host.history(ran)[ran]["outputs"]) == ["2"]


@pytest.mark.parametrize("link", [["1", "0"], ["1", -1], ["1", True], [1, 0], ["1", 0, 0], [], ["1", None], [["1"], 0]])
def test_malformed_links(host, link):
    status, answer = host.submit({"prompt": prompt(n1=("Source", {}), n2=("Sink", {"v": link}))})
    assert status == 400
    assert [kind for kind, _ in errors(answer, "2")] == ["bad_linked_input"]


@pytest.mark.parametrize(
    "nodes",
    [
        {"n1": ("Source", {"a": ["1", 0]}), "n2": ("Sink", {"v": ["1", 0]})},
        {"n1": ("Source", {"a": ["3", 0]}), "n3": ("Source", {"a": ["1", 0]}), "n2": ("Sink", {"v": ["3", 0]})},
    ],
)
def test_a_circle_is_named(host, nodes):
    status, answer = host.submit({"prompt": prompt(**nodes)})
    assert status == 400
    assert answer["error"]["type"] == "dependency_cycle"
    assert "#1" in answer["error"]["details"]
    assert answer["node_errors"] == {}


def test_a_circle_that_no_output_needs_does_no_harm(host):
    nodes = prompt(n1=("Source", {"a": ["1", 0]}), n2=("Sink", {"v": 1}))
    assert host.submit({"prompt": nodes})[0] == 200
    ran = host.run_next()
    assert host.history(ran)[ran]["status"]["completed"]


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "prompt",
        {"prompt": None},
        {"prompt": []},
        {"prompt": {"1": 5}},
        {"prompt": {"1": {"class_type": ["Sink"], "inputs": {}}}},
        {"prompt": {"1": {"class_type": "Sink", "inputs": []}}},
        {"prompt": {"1": {"class_type": "Sink", "inputs": {}}}, "number": "x"},
        {"prompt": {"1": {"class_type": "Sink", "inputs": {}}}, "number": float("nan")},
        {"prompt": {"1": {"class_type": "Sink", "inputs": {}}}, "extra_data": []},
        {"prompt": {"1": {"class_type": "Sink", "inputs": {}}}, "client_id": 1},
        {"prompt": {"1": {"class_type": "Sink", "inputs": {}}}, "prompt_id": {}},
        {"prompt": {"1": {"class_type": "Sink", "inputs": {}}}, "partial_execution_targets": "1"},
        {"prompt": {"1": {"class_type": "Sink", "inputs": {}}}, "partial_execution_targets": [1]},
    ],
)
def test_json_of_another_shape_is_refused_in_the_usual_form(host, body):
    status, answer = host.submit(body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_prompt"
    assert set(answer["error"]) == {"type", "message", "details", "extra_info"}
    assert answer["node_errors"] == {}


def test_nesting_past_the_interpreters_limit_is_refused(host):
    value = []
    for _ in range(100_000):
        value = [value]
    status, answer = host.submit({"prompt": prompt(n1=("Sink", {"v": value}))})
    assert (status, answer["error"]["type"]) == (400, "invalid_prompt")


def test_a_workflow_of_the_editor_is_told_apart(host):
    status, answer = host.submit({"prompt": {"last_node_id": 3, "nodes": [], "links": []}})
    assert status == 400
    assert answer["error"]["type"] == "invalid_prompt"
    assert "Export (API)" in answer["error"]["details"]


def test_dependent_outputs_are_those_that_depend(host):
    nodes = prompt(
        n1=("Source", {"i": -1}),
        n2=("Sink", {"v": ["1", 0]}),
        n3=("Sink", {"v": ["1", 0]}),
        n4=("Source", {"i": -2}),
        n5=("Sink", {"v": ["4", 0]}),
    )
    status, answer = host.submit({"prompt": nodes})
    assert status == 400
    assert answer["node_errors"]["1"]["dependent_outputs"] == ["2", "3"]
    assert answer["node_errors"]["4"]["dependent_outputs"] == ["5"]
    assert set(answer["node_errors"]) == {"1", "4"}


@pytest.mark.parametrize(
    ("inputs", "details"),
    [
        ({"few": "c"}, "few: 'c' not in ['a', 'b']"),
        ({"many": "z"}, "many: 'z' not in (list of length 30)"),
        ({"new": "z"}, "new: 'z' not in ['x', 'y']"),
        ({"several": {"__value__": ["x", "z"]}}, "several: '['x', 'z']' not in ['x', 'y']"),
    ],
)
def test_combos(host, inputs, details):
    status, answer = host.submit({"prompt": prompt(n1=("Combo", inputs))})
    assert status == 400
    assert errors(answer, "1") == [("value_not_in_list", details)]
    quoted = answer["node_errors"]["1"]["errors"][0]["extra_info"]["input_config"]
    assert (quoted is None) == ("many" in inputs)


def test_good_choices_pass(host):
    inputs = {"few": "a", "many": "29", "new": "y", "several": {"__value__": ["x", "y"]}}
    assert host.submit({"prompt": prompt(n1=("Combo", inputs))})[0] == 200


def test_validate_inputs_takes_over_the_inputs_it_names_and_only_those(host):
    assert host.submit({"prompt": prompt(n1=("Named", {"v": 99, "w": 1}))})[0] == 200
    _, answer = host.submit({"prompt": prompt(n1=("Named", {"v": 1, "w": 99}))})
    assert errors(answer, "1") == [("value_bigger_than_max", "w")]


def test_a_class_may_check_the_types_of_its_links_itself(host):
    def submit(**inputs):
        return host.submit({"prompt": prompt(n1=("Source", {}), n2=("OwnTypes", inputs))})

    assert submit(w=["1", 1], v=1)[0] == 200
    status, answer = submit(w=["1", 0])
    assert status == 400
    assert errors(answer, "2") == [("custom_validation_failed", "input_types - got {'w': 'INT'}")]


def test_a_raising_validate_inputs_is_reported(host):
    status, answer = host.submit({"prompt": prompt(n1=("Named", {"v": 13, "w": 1}))})
    assert status == 400
    assert errors(answer, "1") == [("exception_during_validation", "'unlucky'")]
    extra = answer["node_errors"]["1"]["errors"][0]["extra_info"]
    assert extra["exception_type"] == "KeyError"
    assert any("VALIDATE_INPUTS" in line for line in extra["traceback"])


@pytest.mark.parametrize(
    ("given", "wanted", "match"),
    [
        ("INT", "INT", True),
        ("INT", "FLOAT", False),
        ("INT", "FLOAT,INT", True),
        ("INT,STRING", "STRING, MASK", True),
        ("INT,STRING", "FLOAT,MASK", False),
        ("*", "INT", True),
        ("INT", "*", True),
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        (["a"], "COMBO", True),
        (["a"], "STRING", False),
    ],
)
def test_link_types(given, wanted, match):
    assert types_match(given, wanted) is match


def test_a_wildcard_that_overrides_not_equal_matches():
    class Any(str):
        def __ne__(self, other):
            return False

        __hash__ = str.__hash__

    assert types_match("INT", Any("WHATEVER"))


def test_object_info(host):
    info = host.object_info("Sink")["Sink"]
    assert info["input"] == {"required": {}, "optional": {"v": ["INT", {}], "w": ["INT", {"forceInput": True}]}}
    assert info["input_order"] == {"required": [], "optional": ["v", "w"]}
    assert (info["output"], info["output_is_list"], info["output_name"]) == ([], [], [])
    assert info["output_node"] is True
    assert (info["name"], info["display_name"], info["python_module"]) == ("Sink", "Sink", "nodes")
    source = host.object_info("Source")["Source"]
    assert (source["output"], source["output_is_list"]) == (["INT", "STRING"], [False, False])
    assert source["output_node"] is False
    assert host.object_info("Zzz") == {}
    assert {"LoadImage", "LoadImageMask", "SaveImage", "PreviewImage", "Sink"} <= set(host.object_info())


def test_an_id_cannot_be_registered_twice(host):
    with pytest.raises(ValueError, match="SaveImage"):
        host.registry.add({"SaveImage": Sink})
