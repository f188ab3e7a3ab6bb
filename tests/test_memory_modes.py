"""The benchmark of memory modes: its plan follows from the shapes, and it measures what it says."""

import pytest
import torch

from stable_cascade_nodes.benchmarks import memory_modes
from stable_cascade_nodes.benchmarks.memory_modes import FAMILIES, plan_for, running_bytes, shapes_only
from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file, load
from stable_cascade_nodes.cascade_ops.residency import MARGIN
from stable_cascade_nodes.cascade_ops.streaming_plan import BUFFERS, least_bytes


@pytest.mark.parametrize(("stage", "weights"), [("stage_c", 7.18e9), ("stage_b", 3.13e9)])
def test_the_plan_for_cards_follows_from_the_shapes(stage, weights):
    model = shapes_only(stage).to("meta", torch.bfloat16)
    size = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
    assert size == pytest.approx(weights, rel=0.002)
    copied = []
    for card in (2.5, 3, 4, 6, 8, 10):
        budget, plan = plan_for(stage, card, taken=0.5)
        assert budget == int(card * 2**30 - 0.5e9) - MARGIN - running_bytes(stage, model)
        assert (plan is None) == (size <= budget)
        if plan is None:
            copied.append(0)
            continue
        assert plan.total == size and least_bytes(model) <= plan.needed <= budget
        assert plan.streamed == size - plan.resident and plan.needed == plan.resident + BUFFERS * plan.buffer
        # What stays, what a step copies and what only a run copies make up the whole, where no block is repeated.
        if stage == "stage_c":
            moving = sum(tensor.numel() * 2 for name, tensor in model.state_dict().items() if "mapper" in name)
            once = plan.total - plan.resident - plan.per_step
            assert 0 < once < moving
        copied.append(plan.per_step)
    assert copied == sorted(copied, reverse=True) and copied[0] > 0 == copied[-1]


def test_what_is_printed_is_marked_as_predicted(capsys):
    assert memory_modes.main(["plan", "--rate", "10", "--taken", "2"]) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert first == "bfloat16, 1024 x 1024; 2 GB of the card in use by others; predicted at 10 GB/s"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0][-1] == "predicted seconds per step"
    by = {(row[0], row[1]): row for row in rows[2:]}
    assert len(by) == 2 * len(memory_modes.CARDS)
    row = by["Stage C 3.6B", "6 GB"]
    assert float(row[-1]) == pytest.approx(float(row[4].removesuffix(" GB")) / 10, abs=0.01)
    assert by["Stage C 3.6B", "24 GB"][3:] == ["all", "0", "0", "as resident"]


def test_random_files_of_a_family_are_what_they_claim(tmp_path):
    family = {
        "stage_c": FAMILIES["small"]["stage_c"] | {"c_hidden": [64, 64], "c_cond": 64, "nhead": [1, 1]},
        "stage_a": {"c_hidden": 16, "bottleneck_blocks": 1},
        "text_encoder": {"width": 64, "depth": 1},
    }
    memory_modes.FAMILIES["test"] = family
    try:
        sizes = memory_modes.write_family(tmp_path, "test", torch.bfloat16)
    finally:
        del memory_modes.FAMILIES["test"]
    for stage, size in sizes.items():
        info = inspect_file(tmp_path / f"{stage}.safetensors").component(stage)
        module, _ = load(info, stage)
        module = getattr(module, "module", module)
        held = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        assert held == pytest.approx(size, rel=0.01)
        dtype = torch.float32 if stage == "stage_a" else torch.bfloat16
        assert next(module.parameters()).dtype == dtype
