"""Models in 8 bits, for tests."""

import torch

from stable_cascade_nodes.cascade_ops.checkpoints.saving import save
from stable_cascade_nodes.cascade_ops.models import StageC

FORMATS = {"int8 weights": torch.int8, "float8 weights": torch.float8_e4m3fn}
CONFIG = {
    "c_cond": 24,
    "c_hidden": [32, 32],
    "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]],
    "c_clip_text": 20,
    "c_clip_text_pooled": 20,
    "c_clip_img": 12,
    "dropout": 0.0,
}
ATTENTION = "down_blocks.0.2.attention.attn."
FUSED, OUT = ATTENTION + "in_proj_weight", ATTENTION + "out_proj.weight"
LAST = "up_blocks.1.2.attention.attn.out_proj.weight"


def saved_stage_c(path, dtype=None, seed=0, change=lambda model: None):
    """A Stage C of a few channels as a file; returns its path."""
    torch.manual_seed(seed)
    model = StageC(**CONFIG).eval()
    torch.nn.init.normal_(model.clf[1].weight, std=0.3)  # zeros at first
    with torch.no_grad():
        change(model)
    return save(model, path, stage="stage_c", config=CONFIG, dtype=dtype)


def inputs(seed=1):
    """What a prediction of that Stage C needs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (2, 16, 6, 5), "clip_text": (2, 7, 20), "clip_text_pooled": (2, 1, 20), "clip_img": (2, 1, 12)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return given | {"r": torch.tensor([0.3, 0.8])}


@torch.no_grad()
def predicted(model, given=None):
    return model(**(given or inputs()))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
