"""Pictures as latents: what image to image, inpainting by a mask and reconstruction begin from.

Each function changes nothing that it is given, encodes picture by picture, which needs less memory, runs where the
stage's weights are and returns its result in main memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .control_inputs import as_channels_first
from .framing import RESIZES, Fit, Frame, Resize, frame_of, longest_side
from .handles import StageHandle
from .masks import picture_mask
from .models.effnet import normalize_imagenet
from .sizes import STAGE_A_COMPRESSION, STAGE_B_PATCH, encoder_picture_size, stage_b_size, stage_c_size
from .threads import threads_for
from .tiles import tile_count, tiled_encode
from .wires import Latent

Callback = Callable[[int], None]


def stage_c_frame(
    handle: StageHandle,
    image: Tensor,
    width: int = 0,
    height: int = 0,
    fit: Fit = "crop",
    compression: float = 0.0,
) -> Frame:
    """What `encode_stage_c` takes of an `IMAGE` ``[n, H, W, 3]``, see `framing.frame_of`.

    With 0 for both sides the longer one has at most 2560 pixels, beyond which Stage C repeats objects (256 with the
    tiny family): a picture of 6000 x 4000 becomes 2560 x 1704. A higher compression allows for more.
    """
    longest = longest_side(handle.expect("latent_encoder").family, compression)
    picture_height, picture_width = as_channels_first(image).shape[-2:]
    return frame_of(picture_height, picture_width, width, height, fit, longest)


@torch.no_grad()
def encode_stage_c(
    handle: StageHandle,
    image: Tensor,
    width: int = 0,
    height: int = 0,
    *,
    fit: Fit = "crop",
    resize: Resize = "smooth",
    compression: float = 0.0,
    mask: Tensor | None = None,
    callback: Callback | None = None,
) -> Latent:
    """Stage C latents ``[n, 16, ceil(height / 42.67), ceil(width / 42.67)]`` of an `IMAGE` ``[n, H, W, 3]``, 0..1.

    The latent encoder reads pictures at three quarters of their size (`sizes.encoder_picture_size`), so that its latent
    has the size that Stage C makes for ``width x height``: 768 x 768 gives 24 x 24 for 1024 x 1024.

    width, height, fit: see `stage_c_frame`. resize: how the picture is brought to that size. ``smooth`` is bilinear
    with antialiasing, as the family here was trained and as pictures are usually shrunk for training; ``nearest`` takes
    single pixels, as the release's notebook for reconstruction does. compression: pixels of the picture per cell in
    place of 42.67, see `sizes`; 0 is that. mask: ``[H, W]`` or ``[1 or n, H, W]``, 1 where to
    make anew, which goes into the latent. callback: gets the number of pictures that are done.

    Raises:
        ValueError: a wrong stage, picture, mask or name.
    """
    if resize not in RESIZES:
        raise ValueError(f"There is no way to resize called '{resize}': choose one of {', '.join(RESIZES)}.")
    frame = stage_c_frame(handle, image, width, height, fit, compression)
    pictures = as_channels_first(image)
    masks = None if mask is None else frame.mask(mask, len(pictures), *pictures.shape[-2:])
    size = encoder_picture_size(*stage_c_size(frame.height, frame.width, compression))

    def encode(picture: Tensor) -> Tensor:
        seen = frame.picture(picture.to(handle.device), size, resize)
        return handle.module(normalize_imagenet(seen).to(handle.dtype))

    samples = _one_by_one(handle, pictures, encode, callback)
    return Latent(samples, frame.width, frame.height, masks, family=handle.family, compression=compression)


@torch.no_grad()
def encode_stage_a(
    handle: StageHandle,
    image: Tensor,
    *,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    tile: int = 0,
) -> Latent:
    """Stage B latents ``[n, 4, 2 ceil(H / 8), 2 ceil(W / 8)]`` of an `IMAGE` ``[n, H, W, 3]``, 0..1, by Stage A.

    Sides that are no multiples of 8 are padded with the pixels of the edge; decoding gives back the size of the picture
    exactly. mask: as in `encode_stage_c`. tile: pixels a side of the tiles that are encoded one after the other, 0 for
    a picture at once; the result is the same. callback: gets the number of tiles that are done.

    Raises:
        ValueError: a wrong stage, picture or mask, or a tile that is too small.
    """
    handle.expect("stage_a")
    pictures = as_channels_first(image)
    count, _, height, width = pictures.shape
    cell = STAGE_A_COMPRESSION * STAGE_B_PATCH
    pad = (0, -width % cell, 0, -height % cell)
    masks = None if mask is None else F.pad(picture_mask(mask, count, height, width), pad, mode="replicate")

    each = tile_count(stage_b_size(height, width), tile)
    samples: list[Tensor] = []

    def report(done: int) -> None:
        if callback is not None:
            callback(len(samples) * each + done)

    for picture in pictures.split(1):
        with threads_for(handle):
            padded = F.pad(picture, pad, mode="replicate")
            samples.append(tiled_encode(handle.module, padded, tile, report, handle.device))
    return Latent(torch.cat(samples), width, height, masks, family=handle.family)


def _one_by_one(
    handle: StageHandle, pictures: Tensor, encode: Callable[[Tensor], Tensor], callback: Callback | None
) -> Tensor:
    """The latents of ``[n, 3, H, W]`` pictures, float32 in main memory."""
    samples = []
    for picture in pictures.split(1):
        with threads_for(handle):
            samples.append(encode(picture).float().cpu())
        if callback is not None:
            callback(len(samples))
    return torch.cat(samples)
