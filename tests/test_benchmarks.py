"""The benchmark's own rules: what it refuses to report, how it takes turns, what it counts, what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stable_cascade_nodes.benchmarks import cases, command, comparing, floors, measuring, profiling, report
from stable_cascade_nodes.benchmarks.cases import CASES, Case
from stable_cascade_nodes.benchmarks.comparing import Sides
from stable_cascade_nodes.benchmarks.measuring import Options
from stable_cascade_nodes.benchmarks.stage_cases import Setting, stage_a_decode, stage_b_step, stage_c_step

ROOT = Path(__file__).parents[1]
ONE = torch.ones(3)


def case_of(sides, **more):
    return Case("given", "A case that is given", lambda setting: sides, **more)


def test_results_that_differ_have_no_speed():
    sides = Sides(lambda: ONE, lambda: ONE + 0.01, tolerance=1e-3)
    with pytest.raises(ValueError, match=r"differ by 0\.0099, expected at most 0\.001: no speed is reported"):
        measuring._time(case_of(sides), Options(quick=True))


def test_every_way_of_ours_has_to_agree():
    sides = Sides(lambda: ONE, lambda: ONE, {"fast": lambda: ONE * 2}, tolerance=1e-3)
    with pytest.raises(ValueError, match="no speed"):
        comparing.check_agreement(sides)


def test_theirs_is_checked_as_it_was_set_up_for_that():
    sides = Sides(lambda: ONE, lambda: ONE * 2, theirs_to_check=lambda: ONE * 1.001, tolerance=0.01)
    assert comparing.check_agreement(sides) == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.tensor([1, 1, torch.nan]), torch.tensor([1, 1, torch.inf])])
def test_other_shapes_and_what_is_not_finite_never_agree(wrong):
    assert comparing.difference(wrong, ONE) == float("inf")
    assert comparing.difference(wrong, wrong[:3]) == float("inf")


def test_difference_is_relative_to_the_largest_value():
    theirs = torch.tensor([0.5, -4.0])
    assert comparing.difference(theirs + torch.tensor([0.2, 0.0]), theirs) == pytest.approx(0.05)


def test_sides_take_turns_in_changing_order():
    called, seconds = [], iter(range(100))

    def clock(run):
        run()
        return next(seconds)

    samples = comparing.in_turns([lambda: called.append("ours"), lambda: called.append("theirs")], 3, clock)
    assert called == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert samples == [[0, 3, 4], [1, 2, 5]]


def test_summary_of_known_samples():
    found = comparing.summary([1.0, 5.0, 2.0, 4.0, 3.0])
    assert (found["median"], found["least"], found["most"]) == (3.0, 1.0, 5.0)
    assert found["spread"] == pytest.approx((4 - 2) / 2 / 3)
    assert found["samples"] == [1.0, 5.0, 2.0, 4.0, 3.0]
    assert comparing.summary([2.0])["spread"] == 0


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.1, 10))
def test_summary_scales_with_the_clock(samples, factor):
    one, other = comparing.summary(samples), comparing.summary([factor * sample for sample in samples])
    assert one["least"] <= one["median"] <= one["most"]
    assert other["median"] == pytest.approx(factor * one["median"])
    assert other["spread"] == pytest.approx(one["spread"], abs=1e-9)


def test_operations_of_known_layers():
    linear, conv = nn.Linear(5, 3), nn.Conv2d(6, 6, 3, padding=1, groups=6)
    assert floors.operations(lambda: linear(torch.randn(7, 5))) == 2 * 7 * 5 * 3
    assert floors.operations(lambda: conv(torch.randn(2, 6, 8, 8))) == 2 * 2 * 6 * 64 * 9


@pytest.mark.parametrize("guided", [False, True])
def test_operations_of_attention(guided):
    batch = 2 if guided else 1
    query, key, value = (torch.randn(batch, 3, length, 8) for length in (10, 14, 14))
    with torch.no_grad():
        found = floors.operations(lambda: nn.functional.scaled_dot_product_attention(query, key, value))
    assert found == batch * 3 * (2 * 10 * 14 * 8 + 2 * 10 * 14 * 8)


def test_the_larger_limit_is_the_floor():
    rates = floors.Rates(operations=100.0, bytes=10.0)
    found = floors.floor(rates, 500, 20)
    assert (found["seconds"], found["limit"]) == (5.0, "operations")
    found = floors.floor(rates, 500, 200)
    assert (found["seconds"], found["limit"]) == (20.0, "bytes")


def test_measured_rates_are_of_this_machine():
    rates = floors.measured_rates(torch.device("cpu"), torch.float32, small=True)
    assert rates.operations > 1e6
    assert rates.bytes > 1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_agree_in_both_dtypes(dtype):
    setting = Setting(dtype=dtype, quick=True)
    with torch.no_grad():
        built = [stage_c_step("lite", 2, setting), stage_a_decode(1024, setting)]
        built += [stage_b_step("lite", 1, guided, setting) for guided in (False, True)]
        for sides in built:
            assert comparing.check_agreement(sides) < (1e-5 if dtype == torch.float32 else 0.05)
            assert sides.ours().std() > 1e-3


def test_bytes_that_move_are_those_of_weights_and_inputs():
    sides = stage_a_decode(1024, Setting(quick=True))
    assert sides.moved == 4 * (_parameters_of_small_stage_a() + 4 * 16 * 16 + 3 * 64 * 64)


def _parameters_of_small_stage_a():
    from stable_cascade_nodes.benchmarks.models import random_stage

    return sum(tensor.numel() for tensor in random_stage("stage_a", "small").parameters())


def test_only_the_side_that_is_asked_for_is_built():
    ours, theirs = (stage_b_step("lite", 1, True, Setting(sides=side, quick=True)) for side in ("ours", "theirs"))
    assert (ours.theirs, theirs.ours) == (None, None)
    with torch.no_grad():
        assert comparing.difference(ours.ours(), theirs.theirs()) < 1e-5


def test_preparation_is_shared_out_over_the_run():
    sides = Sides(lambda: 4.0, lambda: 9.0, seconds=True, difference=lambda *_: 0.0)
    sides.prepare, sides.prepared_steps = (lambda: 20.0), 10
    row = measuring._time(case_of(sides), Options(repeats=3, quick=True))
    assert row["sides"]["ours"]["samples"] == [6.0] * 3
    assert row["sides"]["theirs"]["samples"] == [9.0] * 3
    assert row["ratios"] == {"ours": 1.5}
    assert row["prepare"] == {"seconds": 20.0, "steps": 10}


def test_chains_are_checked_in_float32_and_timed_in_the_dtype_of_the_device(monkeypatch):
    monkeypatch.setattr(Options, "dtype", torch.bfloat16)
    ran = []

    def build(setting):
        def run(side):
            ran.append((side, setting.dtype))
            return ONE * (1.5 if (side, setting.dtype) == ("theirs", torch.bfloat16) else 1)

        return Sides(lambda: run("ours"), lambda: run("theirs"), counted=False)

    row = measuring._time(Case("given", "A case", build, check_in_float32=True), Options(repeats=1, quick=True))
    assert row["difference"] == 0
    assert set(ran[:2]) == {("ours", torch.float32), ("theirs", torch.float32)}
    assert {dtype for _, dtype in ran[2:]} == {torch.bfloat16}
    assert "agreement was checked in float32" in row["notes"]
    with pytest.raises(ValueError, match="no speed"):
        measuring._time(Case("given", "A case", build), Options(repeats=1, quick=True))


def test_memory_of_a_run_is_what_it_held_at_once():
    kept = 64 * 2**20

    def run():
        return torch.ones(kept // 4).sum()

    found = measuring._memory(case_of(Sides(run, None)), "ours", Options(quick=True), torch.device("cpu"))
    assert 0.9 * kept < found["growth"] < 1.5 * kept
    assert found["total"] >= found["growth"]


def test_a_case_without_room_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 8 * 10**9)
    row = measuring.measure(CASES["stage_c_full_step"], Options())
    assert row["status"] == "not measured"
    assert row["reason"] == "needs about 18 GB of memory, 8 GB are free"


def test_a_case_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(measuring, "_in_child", lambda name, mode, options: {"error": "out of memory"})
    row = measuring.measure(CASES["stage_a_1024"], Options(quick=True))
    assert (row["status"], row["reason"]) == ("failed", "time: out of memory")


def test_a_process_that_dies_is_reported():
    answer = measuring._in_child("stage_a_1024", "time", {"unknown": 1})
    assert "unknown" in answer["error"]


def test_unknown_cases_are_refused():
    with pytest.raises(
        ValueError, match=r"^There is no case 'stage_d': choose out of stage_c_lite_step, .*import_all\.$"
    ):
        cases.chosen(["import", "stage_d"])
    assert cases.chosen([]) == list(CASES.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "stage_d"], "There is no case 'stage_d'"),
        (["--profile", "import"], "import runs in other processes"),
        (["--repeats", "0"], "0 repeats, 2 steps and 0 threads were asked for"),
        (["--device", "tpu"], "The device tpu was asked for, expected cpu"),
        (["--table", "nowhere.json"], "nowhere.json holds no results of this benchmark"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, said, capsys):
    assert command.run(arguments, "") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(said)
    assert output.err.count("\n") == 1


def result():
    """What a run with one measured and one missing case gives."""
    side = {"median": 2.0, "spread": 0.05, "least": 1.9, "most": 2.1, "samples": [1.9, 2.0, 2.1]}
    measured = {
        "name": "stage_c_lite_step",
        "title": "Stage C",
        "target": 1.2,
        "computes": True,
        "status": "measured",
        "difference": 1e-6,
        "notes": ["a note"],
        "sides": {"ours": side, "theirs": {**side, "median": 3.0}, "fast": {**side, "median": 0.5}},
        "ratios": {"ours": 1.5, "fast": 6.0},
        "floor": floors.floor(floors.Rates(8.0, 4.0), counted=1, moved=1),
        "memory_ours": {"growth": 1e8, "total": 2e9},
        "memory_theirs": {"growth": 3e8, "total": 4e9},
    }
    missing = {"name": "b", "title": "Stage B", "target": None, "computes": False, "status": "not measured"}
    machine = {"processor": "a CPU", "cores": 4, "threads": 2, "gpu": None}
    machine.update(torch="2", diffusers="0.42.1", transformers="5")
    cases = [measured, {**missing, "reason": "needs 18 GB"}]
    return {"machine": machine, "dtype": "float32", "repeats": 3, "quick": False, "cases": cases}


def test_table_of_a_file(tmp_path, capsys):
    report.write(result(), tmp_path / "result.json")
    assert command.run(["--table", str(tmp_path / "result.json")], "") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a CPU, 4 cores, 2 threads; float32; torch 2, diffusers 0.42.1")
    assert lines[4:] == [
        "| Stage C | 2 s ± 5 % | 3 s ± 5 % | 1.50 | 1.2 | 0.25 s | 8.00 | 0.10 GB of 2.00 GB | 0.30 GB of 4.00 GB |",
        "| Stage C, fast | 0.5 s ± 5 % | 3 s ± 5 % | 6.00 | 1.2 | 0.25 s | 2.00 |  |  |",
        "| Stage B | not measured | not measured | not measured |  |  |  |  |  |",
        "| Stage C, bfloat16 on a GPU | not measured | not measured | not measured |  |  |  |  |  |",
        "",
        "- Stage C: a note; the results differ by 1.0e-06 at most; the floor is set by bytes.",
        "- Stage B: not measured: needs 18 GB.",
    ]


def test_on_a_gpu_no_row_is_listed_twice():
    found = result()
    found["machine"]["gpu"] = "A GPU"
    table = report.table(found)
    assert table.startswith("A GPU; float32")
    assert "on a GPU" not in table


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": {}, "cases": []}', "\x00"])
def test_files_without_results_are_refused(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results of this benchmark"):
        report.read(path)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix product"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::native_layer_norm", "norm"),
        ("aten::linalg_vector_norm", "norm"),
        ("aten::gelu", "activation"),
        ("aten::copy_", "copy"),
        ("aten::cat", "copy"),
        ("aten::addcmul", "elementwise"),
        ("aten::mul", "elementwise"),
        ("aten::mean", "reduction"),
        ("aten::as_strided", "view and dispatch"),
    ],
)
def test_kinds_of_operations(operation, kind):
    assert profiling.kind_of(operation) == kind


def test_a_convolution_of_single_pixels_is_a_matrix_product():
    assert profiling.kind_of("aten::mkldnn_convolution", [[1, 8, 1, 64], [16, 8, 1, 1], []]) == "matrix product"
    assert profiling.kind_of("aten::mkldnn_convolution", [[1, 8, 9, 9], [8, 1, 3, 3], []]) == "convolution"


def test_profile_of_a_case():
    text = profiling.profile(CASES["stage_a_1024"], Options(quick=True))
    assert text.startswith(CASES["stage_a_1024"].title)
    assert text.count("| matrix product |") == text.count("| convolution |") == 2
    assert "`aten::addmm`" in text


def test_all_parts_of_a_run(monkeypatch, tmp_path, capsys):
    """Without processes of their own: time and the memory of either side, the file, and the table from it."""
    monkeypatch.setattr(
        measuring, "_in_child", lambda name, mode, options: measuring.child(mode, name, Options(**options))
    )
    path = tmp_path / "result.json"
    arguments = ["--quick", "--repeats", "2", "--device", "cpu", "--folder", str(tmp_path), "--json", str(path)]
    arguments += ["--cases", "stage_c_lite_step", "load_stage_c_lite", "load_stage_c_lite_file", "stage_a_2048"]
    assert command.run(arguments, "") == 0
    found = report.read(path)
    assert [row["status"] for row in found["cases"]] == ["measured"] * 4
    for row in found["cases"]:
        assert len(row["sides"]["ours"]["samples"]) == 2
        assert row["ratios"]["ours"] == row["sides"]["theirs"]["median"] / row["sides"]["ours"]["median"]
        assert row["memory_theirs"].keys() == {"growth", "total"}
    assert found["cases"][1]["floor"]["limit"] == "bytes"
    assert report.table(found) == capsys.readouterr().out


def test_floors_are_by_the_best_rates_of_a_file():
    """The second case found the machine twice as fast: so the first one is as far from that as it is."""
    side = {"samples": [1.0], "median": 1.0, "spread": 0.0}
    row = {"title": "A", "status": "measured", "target": None, "computes": False, "difference": 0.0, "notes": []}
    row.update(sides={"ours": side, "theirs": side}, ratios={"ours": 1.0})
    rows = [{**row, "floor": floors.floor(floors.Rates(rate, 1e9), 8, 0)} for rate in (16.0, 32.0)]
    machine = {"processor": "a CPU", "cores": 4, "threads": 2, "gpu": None}
    machine.update(torch="2", diffusers="0.42.1", transformers="5")
    lines = report.table({"machine": machine, "dtype": "float32", "repeats": 1, "quick": False, "cases": rows})
    assert [line.split(" | ")[5:7] for line in lines.splitlines() if line.startswith("| A")] == [["0.25 s", "4.00"]] * 2


def test_a_child_prints_what_it_measured():
    answer = measuring._in_child("stage_a_1024", "memory_ours", {"quick": True})
    assert answer["memory_ours"].keys() == {"growth", "total"}


def test_imports_have_no_memory_of_this_process():
    assert measuring.child("memory_ours", "import", Options()) == {}


def test_the_command_from_a_clone(tmp_path):
    """From the root of a folder of any name, which is then the package."""
    clone = tmp_path / "a-clone"
    clone.symlink_to(ROOT)
    path = tmp_path / "result.json"
    report.write(result(), path)
    other = tmp_path / "installed" / "stable_cascade_nodes" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise ImportError('another copy than the clone')")
    command = [sys.executable, "-m", "benchmarks", "--table", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(other.parents[1])}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, report.table(result())), done.stderr


if torch.cuda.is_available():

    @pytest.mark.parametrize("name", ["stage_c_lite_step", "stage_b_lite_step", "stage_a_1024", "text_to_image_lite"])
    def test_a_case_is_measured_on_a_gpu(name):
        options = Options(repeats=2, device="cuda", quick=True)
        row = measuring.child("time", name, options)
        assert row["difference"] <= row["tolerance"]
        assert ("with CUDA graphs" in row["ratios"]) == (name != "stage_a_1024")
        memory = measuring.child("memory_ours", name, options)["memory_ours"]
        assert 0 < memory["growth"] <= memory["total"]
