"""What the known releases are called, and what their shapes cannot say.

Numbers from the published checkpoints and from the configurations of the reference repository
(Stability-AI/StableCascade, ``configs/inference``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

SCALE_FACTOR = 0.43
DIFFUSERS_SCALE_FACTOR = 0.3764  # of the `vqgan` folder of the diffusers release

SAMPLING_DEFAULTS = {
    "stage_c": {"width": 1024, "height": 1024, "guidance": 4.0, "steps": 20, "shift": 2.0},
    "stage_b": {"guidance": 1.1, "steps": 10, "shift": 1.0},
}


@dataclass(frozen=True)
class Release:
    """A published model: its size name, its place among those of its stage (0 = full size), and its own arguments."""

    size: str
    rank: int = 0
    config: dict = field(default_factory=dict)


# (stage, parameters) of every published model.
RELEASES = {
    ("stage_c", 3_589_103_632): Release("3.6B"),
    ("stage_c", 1_030_785_040): Release("1B lite", 1),
    ("stage_b", 1_562_941_136): Release("1.5B"),
    # The reference gives level 1 nine heads and no attention to use them.
    ("stage_b", 699_471_248): Release("700M lite", 1, {"nhead": [-1, 9, 18, 18]}),
    ("stage_a", 18_406_894): Release("18M"),
    ("latent_encoder", 20_197_968): Release("20M"),
    ("previewer", 3_979_651): Release("4M"),
    ("controlnet", 54_255_776): Release("canny"),
    ("controlnet", 54_256_424): Release("inpainting"),
    ("controlnet", 203_491_584): Release("super resolution"),
    ("controlnet", 102_763_008): Release("identity"),
    ("text_encoder", 694_659_840): Release("ViT-bigG/14"),
    ("image_encoder", 303_966_208): Release("ViT-L/14"),
}
