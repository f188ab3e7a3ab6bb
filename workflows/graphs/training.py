"""Training in the graph."""

from __future__ import annotations

from ..layout import Column, Node, Workflow
from .parts import LATENT_ENCODER, MODELS, OWN, TABLE, decode, prompt, sample_b, sample_c, save, size

_NOTE = f"""\
# Train a LoRA on your pictures

Teaches Stage C a new word, `[thing]`, from two pictures, then makes a picture without and with it. Here the pictures
are made in the graph, so that it runs anywhere. **Change first:** put your pictures into a folder below `input`, name
it in *train LoRA* at `folder`, disconnect `pictures`, and write in `captions` what they show, with `[thing]` where
your thing is.

The LoRA is also written to `models/loras`, and the word to `models/embeddings`. The settings suit the tiny model; for
the published ones take 500 steps or more at a `learning_rate` of 0.0001.

{TABLE}| `effnet_encoder` | vae |
{OWN}"""

TRAIN_LORA = Workflow(
    "train_lora",
    _NOTE,
    (
        Column("Models", (*MODELS.nodes, LATENT_ENCODER), width=250),
        Column(
            "Pictures to learn from",
            (
                prompt(7, "What they show", "a large yellow circle on the left on a blue background"),
                prompt(8, "Negative prompt", ""),
                size(9, batch_size=2),
            ),
            "text",
        ),
        Column("Stage C: the pictures", (sample_c(10, 7, 8, 9),), "stage_c"),
        Column("Stage B and A: the pictures", (sample_b(11, 10, 7, 8), decode(12, 11)), "stage_b"),
        Column(
            "Training",
            (
                Node(
                    13,
                    "CascadeTrainLoRA",
                    {
                        "stage_c": (2, 0),
                        "text_encoder": (1, 0),
                        "latent_encoder": (6, 0),
                        "pictures": (12, 0),
                        "captions": "a large [thing] on the left on a blue background",
                        "name": "thing",
                        "steps": 60,
                        "learning_rate": 0.001,
                        "batch_size": 2,
                        "token": "[thing]",
                        "initial_words": "red circle",
                    },
                    height=760,
                    said=True,
                ),
                save(25, 13, "cascade_loss", "The error", output=3),
            ),
            "stage_c",
            width=320,
        ),
        Column(
            "Before and after: prompts",
            (
                prompt(14, "Before: what [thing] began as", "a large red circle on the right on a white background"),
                prompt(15, "After", "a large [thing] on the right on a white background", (13, 1)),
                size(16),
            ),
            "text",
        ),
        Column(
            "Stage C: before and after",
            (sample_c(17, 14, 8, 16, "Before"), sample_c(18, 15, 8, 16, "After", stage_c=(13, 0))),
            "stage_c",
        ),
        Column("Stage B: before and after", (sample_b(19, 17, 14, 8), sample_b(20, 18, 15, 8)), "stage_b"),
        Column(
            "Stage A: before and after",
            (
                decode(21, 19),
                save(22, 21, "cascade_before", "Before"),
                decode(23, 20),
                save(24, 23, "cascade_after", "After"),
            ),
            "stage_a",
            width=300,
        ),
    ),
)
