"""The tiny Cascade family: its folder, its sizes, and how a picture becomes its inputs.

`tiny/configs` has the networks. Widths for text and pictures differ on purpose, so that a mix-up fails loudly. Heads
are 64 wide, as in the release.
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


def as_images(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 pictures ``[N, H, W, 3]`` as float32 ``[N, 3, H, W]``, 0..1."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 255


def encoder_input(images: Tensor) -> Tensor:
    """Pictures ``[N, 3, 256, 256]`` at the size that the latent encoder sees, not yet normalised."""
    return F.interpolate(images, size=(ENCODE_SIZE, ENCODE_SIZE), mode="bilinear", antialias=True)
