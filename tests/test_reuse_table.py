"""How approximations are measured."""

import json

import numpy as np
import pytest
import torch

from stable_cascade_nodes.benchmarks import approximations
from stable_cascade_nodes.benchmarks.approximations import Chain, Way, into_page, measured, published, row_of, ways
from stable_cascade_nodes.benchmarks.floors import operations
from stable_cascade_nodes.benchmarks.models import CONFIGS, without_memory
from stable_cascade_nodes.cascade_ops.handles import DTYPES
from stable_cascade_nodes.cascade_ops.reuse import InnerReuse


@pytest.fixture(scope="module", autouse=True)
def four_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximations, "STEPS", {"stage_c": 4, "stage_b": 4})
        yield


@pytest.fixture(scope="module")
def chain(four_steps):
    return Chain(1)


def test_every_kind_of_approximation_is_there():
    found = ways()
    assert {way.kind for way in found} == {"guidance interval", "reused inner blocks", "fewer steps", "smaller numbers"}
    assert len({(way.stage, way.kind, way.name) for way in found}) == len(found)
    assert {(way.reuse.every, way.reuse.outer) for way in found if way.reuse} == {
        (n, o) for n in (2, 3) for o in (1, 2, 3)
    }
    assert {way.dtype for way in found} <= set(DTYPES)


def test_a_way_that_changes_nothing_makes_no_error_and_one_that_does_makes_some(chain):
    same = measured(chain, Way("none", "", "stage_b"), 1)
    assert (same["largest_difference"], same["operations"], same["read_the_same"]) == (0, 1, 1)
    row = measured(chain, Way("reused inner blocks", "", "stage_b", reuse=InnerReuse(2, 1)), 1)
    assert row["largest_difference"] > 0 and row["psnr"] < same["psnr"] - 10
    # Two of four steps with three tenths of the operations.
    assert 0.6 < row["operations"] < 0.7 and row["weight_bytes"] == 1
    row = measured(chain, Way("guidance interval", "", "stage_c", {"guidance_until": 0.5}), 1)
    # Three of four steps with both halves, and what is prepared for both.
    assert row["operations"] == pytest.approx(7 / 8, abs=0.03)
    assert measured(chain, Way("", "", "stage_b", dtype="bfloat16"), 1)["weight_bytes"] == 0.5


def test_what_is_read_in_the_pictures_is_compared_with_the_exact_ones(chain, monkeypatch):
    black = np.zeros_like(chain.exact)
    monkeypatch.setattr(Chain, "pictures", lambda *_: black)
    row = measured(chain, Way("", "", "stage_b"), 1)
    assert row["largest_difference"] == chain.exact.max() and row["psnr"] < 20
    assert (row["read_the_same"], row["right"]) == (0, 0)


def test_operations_of_the_published_sizes_are_those_of_a_run(monkeypatch):
    monkeypatch.setattr(approximations, "PUBLISHED_SIDE", 64)
    rows = published("small")
    model = without_memory("stage_b", CONFIGS["stage_b"]["small"]).to("meta")
    with torch.no_grad(), torch.device("meta"):
        text = torch.empty(2, 1, model.clip_mapper.in_features)
        prepared = model.prepare(torch.zeros(1), torch.empty(2, 16, 24, 24), text, (64, 64))
        whole = operations(lambda: model.step(torch.empty(2, 4, 64, 64), prepared, 0))
    found = {(row["every"], row["outer"]): row for row in rows}
    for row in found.values():
        # Of four steps, every second one or every third.
        assert row["step_operations"] == whole
        assert row["run"] == pytest.approx((2 + 2 * row["reusing_step"]) / 4)
    assert found[2, 1]["reusing_step"] < found[2, 2]["reusing_step"] < found[2, 3]["reusing_step"] < 1


def test_a_stage_that_refuses_its_numbers_has_a_line_that_says_so(chain, monkeypatch):
    def refuse(*_):
        raise ValueError("not finite")

    monkeypatch.setattr(Chain, "pictures", refuse)
    row = row_of(chain, Way("smaller numbers", "float16", "stage_b", dtype="float16"), 1)
    assert row["refused"] == "not finite"
    line = approximations.ways_table([row], 1.0).splitlines()[-1]
    assert line.startswith("| smaller numbers | Stage B | float16 | refuses |") and line.count("|") == 11
    with pytest.raises(ValueError, match="not finite"):
        row_of(chain, Way("fewer steps", "", "stage_b"), 1)


def test_tables_are_put_where_the_page_names_them():
    page = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter <!-- b --> <!-- end of b -->"
    assert into_page(page, "a", "new") == page.replace("\nold\n", "\n\nnew\n\n")
    assert into_page(into_page(page, "a", "x"), "a", "new") == into_page(page, "a", "new")
    for broken in ("a", "<!-- c -->", "<!-- end of c --> <!-- c -->"):
        with pytest.raises(ValueError, match="The page has no <!-- c --> with an <!-- end of c --> after it"):
            into_page(broken, "c", "new")


def test_the_command_writes_the_page_and_the_numbers(chain, tmp_path, monkeypatch, capsys):
    few = [
        Way("fewer steps", "ddpm, 2", "stage_b", {"steps": 2}),
        Way("smaller numbers", "bfloat16", "stage_b", dtype="bfloat16"),
    ]
    monkeypatch.setattr(approximations, "ways", lambda: few)
    monkeypatch.setattr(approximations, "Chain", lambda count: chain)
    monkeypatch.setattr(approximations, "PUBLISHED_SIDE", 64)
    monkeypatch.setattr(approximations, "SIZES", ("small",))
    page, numbers = tmp_path / "page.md", tmp_path / "rows.json"
    names = ("measured approximations", "counted operations")
    page.write_text("".join(f"<!-- {name} --><!-- end of {name} -->\n" for name in names))
    approximations.main(["--count", "1", "--repeats", "1", "--page", str(page), "--json", str(numbers)])
    content, text = json.loads(numbers.read_text()), page.read_text()
    assert [row["name"] for row in content["rows"]] == ["ddpm, 2", "bfloat16"]
    assert content["rows"][0]["operations"] == pytest.approx(0.5, abs=0.01) and len(content["published"]) == 6
    row = content["rows"][0]
    shown = f"| fewer steps | Stage B | ddpm, 2 | {row['psnr']:.1f} dB | {row['largest_difference']} |"
    assert shown in text and shown in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [11] * 5 + [5] * 5
