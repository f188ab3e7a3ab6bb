"""Checks inside ComfyUI: another choice out of a batch."""

from comfyui_inside import check
from explore_kit import FOLLOWING, SAMPLER_B, choosing


@check
def another_choice_runs_only_what_follows_and_samples_only_what_is_new(inside):
    graph = inside.graphs["text_to_image"]
    inside.execute(choosing(graph, "0, 2"))
    for choice, new, said in (
        ("0, 2, 3", True, ["2 of 3 pictures kept from an earlier run"]),
        ("3", False, ["1 of 1 pictures kept from an earlier run"]),
        ("1", True, []),
    ):
        progress = []
        inside.on_progress = lambda value, total, progress=progress: progress.append((value, total))
        changed = choosing(graph, choice)
        _, cached = inside.execute(changed)
        inside.on_progress = None
        assert set(changed) - cached == FOLLOWING, (choice, cached)
        assert [(3, 3) in progress, shown(inside)[1:]] == [new, said], (choice, progress, shown(inside))


def shown(inside):
    """What the sampler of Stage B said of its run."""
    found = (data for event, data in inside.messages if event == "executed" and data["node"] == SAMPLER_B)
    return next(found)["output"]["text"]
