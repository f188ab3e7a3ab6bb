"""Which attention blocks take what from a picture, on the tiny family and in little: see `tiny.evaluate_blocks`."""

from dataclasses import replace

import pytest
import torch

from stable_cascade_nodes.cascade_ops.checkpoints import load
from stable_cascade_nodes.tiny import evaluate_blocks
from stable_cascade_nodes.tiny.evaluate import Family, measured_scenes, shares
from stable_cascade_nodes.tiny.evaluate_blocks import COLUMNS, PROMPTED, ROWS, TWO, read_in
from stable_cascade_nodes.tiny.family import WEIGHTS

COUNT = 8


@pytest.fixture(scope="module")
def family():
    family = Family.load(WEIGHTS)
    few = {"defaults_c": {**family.defaults_c, "steps": 6}, "defaults_b": {**family.defaults_b, "steps": 2}}
    return replace(family, **few)


def test_of_two_pictures_the_one_in_the_first_group_gives_the_background(family):
    adapter, _ = load(WEIGHTS / "ip_adapter.safetensors", expect="ip_adapter", dtype=torch.float32)
    scenes = measured_scenes(2 * COUNT, "test", 1)
    scenes, others = scenes[:COUNT], scenes[COUNT:]
    parts = [(scenes, ROWS["down_outer"]), (others, ROWS["all but down_outer"])]
    both = read_in(family, adapter, parts, [""] * COUNT)
    assert shares(scenes, both)["background colour"] >= 0.6 and shares(others, both)["background colour"] <= 0.3


def test_the_table_counts_what_each_row_is_about(monkeypatch):
    """With a chain that draws the pictures' backgrounds and, where there are others, their objects."""
    asked = []

    def drawing(family, adapter, references, prompts):
        asked.append(([groups for _, groups in references], prompts[0]))
        first, last = references[0][0], references[-1][0]
        if prompts[0]:
            last = measured_scenes(8, "test", 1)[4:]
        return evaluate_blocks.drawn(
            [replace(scene, objects=other.objects) for scene, other in zip(first, last, strict=True)]
        )

    monkeypatch.setattr(evaluate_blocks, "read_in", drawing)
    results = evaluate_blocks.measure(WEIGHTS, 4)
    assert list(results) == [*ROWS, TWO, *PROMPTED]
    assert all(results[name][column] == 1 for name in ROWS for column in COLUMNS)
    # An object of the background's colour cannot be seen.
    assert all(results[name][column] >= 0.75 for name in (TWO, *PROMPTED) for column in COLUMNS)
    assert [groups for groups, _ in asked] == [
        *([groups] for groups in ROWS.values()),
        [(1, 0, 0, 0), (0, 1, 1, 1)],
        [(0, 0, 0, 0)],
        [(1, 1, 1, 1)],
    ]
    assert all(prompt == "" for _, prompt in asked[:-2]) and " background" not in asked[-1][1]
    lines = evaluate_blocks.table(results).splitlines()
    assert lines[2] == "| none | 1.00 | 1.00 | 1.00 |" and len(lines) == 2 + len(results)
