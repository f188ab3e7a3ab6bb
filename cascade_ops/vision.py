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


def clip_pixels(images: Tensor, size: int = CLIP_SIZE) -> Tensor:
    """Pictures ``[B, 3, H, W]``, 0..1, as CLIP sees them: float32 ``[B, 3, size, size]`` in main memory, normalised.

    The shorter side is resized to `size` (Pillow's bicubic filter on 8-bit pixels, as the published preprocessing
    does it) and the middle is cut out.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Pictures of shape {list(images.shape)} were given, expected [B, 3, H, W] with values 0..1.")
    height, width = images.shape[-2:]
    short = min(height, width)
    new_width, new_height = int(size * width / short), int(size * height / short)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    pictures = images.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    pixels = []
    for picture in pictures:
        small = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC)
        middle = small.crop((left, top, left + size, top + size))
        pixels.append((np.asarray(middle, np.float32) / 255 - mean) / std)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode_pictures(handle: StageHandle, images: Tensor) -> Tensor:
    """Image embeddings float32 ``[B, 1, E]`` of pictures ``[B, 3, H, W]``, 0..1, where the encoder computes."""
    model = handle.expect("image_encoder").module
    pixels = clip_pixels(images, model.config.image_size).to(handle.device, handle.dtype)
    with threads_for(handle):
        return model(pixel_values=pixels).image_embeds.float()[:, None]
