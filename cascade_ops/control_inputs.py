"""Controls as they travel between nodes: made of pictures here, read by a ControlNet that `attachments` applies.

A control is made at the size at which the ControlNets learned to read it for a picture as large as the one given: three
quarters of it, in whole cells of Stage C's latent. For a picture of another size it is resized when it is sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .control import CONTROL_KINDS, canny, canny_control, control_picture, inpainting_control, super_resolution_control
from .control.canny import HIGH, LOW, REFERENCE_SIDE
from .handles import StageHandle
from .sizes import ENCODER_COMPRESSION, stage_c_size
from .threads import threads_for

# Edges of larger pictures are looked for in the picture made smaller: the ControlNet learned from such.
_LARGEST_FOR_EDGES = 1024


@dataclass(frozen=True, eq=False)
class ControlInput:
    """The value of a `CASCADE_CONTROL` wire: what one ControlNet reads.

    kind: a name of `control.CONTROL_KINDS`. samples: float32 ``[n, c, H, W]``: pixels for ``canny`` (1 channel, edges
    0..1) and ``inpainting`` (4: the picture with white holes, the mask); one cell per 32 pixels for
    ``super_resolution`` (16) and ``identity`` (512). size: ``(height, width)`` of the picture that it is of, whose
    shape counts; None is that of the samples. family: of the weights that made them, as in `wires.Latent`.
    """

    kind: str
    samples: Tensor
    size: tuple[int, int] | None = None
    family: str = ""

    def __post_init__(self) -> None:
        if self.kind not in CONTROL_KINDS or self.samples.ndim != 4:
            raise ValueError(
                f"A control of the kind '{self.kind}' with samples of shape {list(self.samples.shape)} was given, "
                f"expected one of {', '.join(CONTROL_KINDS)} and [batch, channels, height, width]: connect a control "
                "node such as 'Cascade: canny control'."
            )

    def picture(self) -> Tensor:
        """What a person can see of it, an `IMAGE` ``[n, H, W, 3]``: edges, or the picture with its holes."""
        return self.samples[:, :3].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clamp(0, 1).contiguous()


@torch.no_grad()
def canny_input(image: Tensor, low: float = LOW, high: float = HIGH, side: int = REFERENCE_SIDE) -> ControlInput:
    """Edges of an `IMAGE` ``[n, H, W, 3]``.

    low, high: see `control.canny`. side: edges are looked for in the picture stretched to a square of this side, as the
    published ControlNet learned them; 0 finds the finest, in the picture at its own size.
    """
    pictures = as_channels_first(image)
    if not side:
        return ControlInput("canny", canny(pictures, low, high))
    height, width = pictures.shape[-2:]
    scale = min(1.0, _LARGEST_FOR_EDGES / math.sqrt(height * width))
    size = stage_c_size(max(1, round(height * scale)), max(1, round(width * scale)))
    return ControlInput("canny", canny_control(control_picture(pictures, *size), low, high, side), (height, width))


@torch.no_grad()
def inpainting_input(image: Tensor, mask: Tensor) -> ControlInput:
    """An `IMAGE` ``[n, H, W, 3]`` with holes where the `MASK` ``[n or 1, H, W]`` is at least a half.

    Raises:
        ValueError: a mask of another shape than the picture's, or of another batch.
    """
    pictures = as_channels_first(image)
    count, _, height, width = pictures.shape
    masks = mask.float().reshape(-1, 1, *mask.shape[-2:])
    rows, columns = masks.shape[-2:]
    if len(masks) not in (1, count) or abs(rows * width - columns * height) > max(height, width):
        raise ValueError(
            f"There are {len(masks)} masks of {columns} x {rows} for {count} pictures of {width} x {height}, expected "
            f"1 or {count} of the picture's size: paint the mask on this picture."
        )
    size = stage_c_size(height, width)
    small = control_picture(masks, *size)
    return ControlInput("inpainting", inpainting_control(control_picture(pictures, *size), small), (height, width))


@torch.no_grad()
def super_resolution_input(encoder: StageHandle, image: Tensor) -> tuple[ControlInput, Tensor]:
    """The latent of a small `IMAGE` ``[n, H, W, 3]``, doubled, and the picture as the latent encoder saw it.

    Sides are resized up to multiples of 32; picture by picture, which needs less memory.
    """
    encoder.expect("latent_encoder")
    pictures = as_channels_first(image)
    height, width = pictures.shape[-2:]
    size = [math.ceil(side / ENCODER_COMPRESSION) * ENCODER_COMPRESSION for side in (height, width)]
    if size != [height, width]:
        pictures = F.interpolate(pictures, size=size, mode="bilinear").clamp(0, 1)
    with threads_for(encoder):
        samples = [super_resolution_control(encoder.module, one.to(encoder.device)).cpu() for one in pictures.split(1)]
    shown = pictures.permute(0, 2, 3, 1).contiguous()
    return ControlInput("super_resolution", torch.cat(samples), (height, width), encoder.family), shown


def as_channels_first(image: Tensor) -> Tensor:
    """An `IMAGE` ``[n, H, W, 3]`` as ``[n, 3, H, W]``, float32 0..1 in main memory, without transparency.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4):
        found = f"values of shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"The image input holds {found}, expected pictures [batch, height, width, 3]: connect an image."
        )
    return image[..., :3].detach().float().cpu().clamp(0, 1).permute(0, 3, 1, 2).contiguous()
