"""Many compositions first, the chosen ones in full."""

from __future__ import annotations

from ..layout import Column, Node, Shot, Workflow
from .parts import FILES, MODELS, decode, prompt, sample_b, sample_c, save, size

_NOTE = f"""\
# Explore, then finish

Stage C makes twenty compositions and the previewer shows them with their numbers; Stages B and A finish only the ones
whose numbers are in *Your choice*. **Change first:** the prompt; then, with the small pictures before you, the numbers
in `indexes`, and press **Run** again: Stage C is not run again, and Stage B makes only what is new in the choice.

{FILES}"""

EXPLORE_THEN_FINISH = Workflow(
    "explore_then_finish",
    _NOTE,
    (
        MODELS,
        Column(
            "Prompt and size",
            (
                prompt(6, "Prompt", "a blue circle on a yellow background"),
                prompt(7, "Negative prompt", ""),
                size(8, batch_size=20),
            ),
            "text",
        ),
        Column("Stage C: what is seen", (sample_c(9, 6, 7, 8),), "stage_c"),
        Column(
            "Explore",
            (
                Node(10, "CascadePreviewLatent", {"previewer": (5, 0), "latent": (9, 0), "numbered": True}),
                Node(11, "PreviewImage", {"images": (10, 0)}, "Twenty small pictures", height=420),
                Node(
                    12,
                    "CascadeSelectLatents",
                    {"latent": (9, 0), "indexes": "1, 10, 12"},
                    "Your choice",
                    said=True,
                ),
            ),
            "stage_c",
            width=420,
        ),
        Column("Stage B: detail, of the choice", (sample_b(13, 12, 6, 7),), "stage_b"),
        Column("Stage A: the pictures", (decode(14, 13), save(15, 14, "cascade_chosen")), "stage_a", width=300),
    ),
    shots=(
        Shot("Explored: what Stage C made of one prompt, as small pictures", 11, batch=True),
        Shot("Finished: 1, 10 and 12", 15, batch=True),
    ),
)
