"""The CLIP image encoder: pictures in, the embedding that Stage C reads out.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021) and the published
preprocessing; the published model is OpenAI's ViT-L/14 (embeddings 768 wide). Stage C takes the projected embedding as
it is, not normalised to length 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .handles import StageHandle
from .threads import threads_for

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SIZE = 224
CROPS = ("center", "pad", "stretch")


def clip_pixels(images: Tensor, size: int = CLIP_SIZE, crop: str = "center") -> Tensor:
    """Pictures ``[B, 3, H, W]``, 0..1, as CLIP sees them: float32 ``[B, 3, size, size]`` in main memory, normalised.

    crop: how a picture that is no square becomes one.

    * ``center``, the published preprocessing: its shorter side becomes `size` long and the middle is cut out.
    * ``pad``: its longer side becomes `size` long; what is missing is CLIP's mean colour, zeros once normalised.
    * ``stretch``: both sides become `size` long.

    Pillow's bicubic filter on 8-bit pixels resizes in all of them, and a square picture gives the same in all of them.

    Raises ValueError for another shape, pictures without pixels, and an unknown `crop`.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"Pictures of shape {list(images.shape)} were given, expected [B, 3, H, W] with values 0..1: give pictures "
            "with three colours."
        )
    width, height = _resized(images.shape[-1], images.shape[-2], size, crop)
    pictures = images.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    pixels = torch.zeros(len(pictures), 3, size, size)
    for target, picture in zip(pixels, pictures, strict=True):
        small = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        # One of the two moves the picture in its square, the other does nothing.
        left, top = max(width - size, 0) // 2, max(height - size, 0) // 2
        seen = small.crop((left, top, min(left + size, width), min(top + size, height)))
        right, below = (size - seen.width) // 2, (size - seen.height) // 2
        target[:, below : below + seen.height, right : right + seen.width] = _normalised(np.asarray(seen))
    return pixels


def _resized(width: int, height: int, size: int, crop: str) -> tuple[int, int]:
    """Width and height that a picture is resized to before it is cut or padded to a square."""
    if crop == "stretch":
        return size, size
    if crop == "center":
        short = min(width, height)
        return int(size * width / short), int(size * height / short)
    if crop == "pad":
        long = max(width, height)
        return max(1, round(size * width / long)), max(1, round(size * height / long))
    raise ValueError(f"The crop is {crop!r}, expected one of {', '.join(CROPS)}: choose one of these.")


def _normalised(pixels: np.ndarray) -> Tensor:
    """8-bit pixels ``[H, W, 3]`` as float32 ``[3, H, W]`` with CLIP's mean and deviation taken out."""
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    return torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1)


@torch.no_grad()
def encode_pictures(handle: StageHandle, images: Tensor, crop: str = "center") -> Tensor:
    """Image embeddings float32 ``[B, 1, E]`` of pictures ``[B, 3, H, W]``, 0..1, where the encoder computes.

    crop: see `clip_pixels`.
    """
    model = handle.expect("image_encoder").module
    pixels = clip_pixels(images, model.config.image_size, crop).to(handle.device, handle.dtype)
    with threads_for(handle):
        return model(pixel_values=pixels).image_embeds.float()[:, None]
