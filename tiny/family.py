"""The tiny Cascade family: its configurations, its folders, and how a picture becomes its inputs.

Widths for text and pictures differ on purpose, so that a mix-up fails loudly. Heads are 64 wide, as in the release.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"

IMAGE_SIZE = 256
# The release encodes at 3/4 of the picture's size, which makes 42.67 pixels of one latent cell.
ENCODE_SIZE = IMAGE_SIZE * 3 // 4
STAGE_C_SIZE = ENCODE_SIZE // 32
STAGE_B_SIZE = IMAGE_SIZE // 4

TEXT_WIDTH = 128
IMAGE_WIDTH = 96

STAGE_A = {"levels": 2, "bottleneck_blocks": 3, "c_hidden": 64, "c_latent": 4, "codebook_size": 1024}
LATENT_ENCODER = {"c_latent": 16, "widths": [8, 8, 16, 32, 48, 64, 128, 256], "depths": [1, 1, 1, 1, 1, 2]}
PREVIEWER = {"c_in": 16, "c_hidden": 96}
STAGE_C = {
    "c_cond": 128,
    "c_hidden": [128, 128],
    "nhead": [2, 2],
    "blocks": [[2, 4], [4, 2]],
    "c_clip_text": TEXT_WIDTH,
    "c_clip_text_pooled": TEXT_WIDTH,
    "c_clip_img": IMAGE_WIDTH,
    "dropout": 0.0,
}
STAGE_B = {
    "c_cond": 128,
    "c_hidden": [64, 96, 128, 128],
    "nhead": [-1, -1, 2, 2],
    "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "c_clip": TEXT_WIDTH,
    "dropout": 0.0,
}


def as_images(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 pictures ``[N, H, W, 3]`` as float32 ``[N, 3, H, W]``, 0..1."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 255


def encoder_input(images: Tensor) -> Tensor:
    """Pictures ``[N, 3, 256, 256]`` at the size that the latent encoder sees, not yet normalised."""
    return F.interpolate(images, size=(ENCODE_SIZE, ENCODE_SIZE), mode="bilinear", antialias=True)
