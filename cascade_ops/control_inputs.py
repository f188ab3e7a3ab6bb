"""Controls as they travel between nodes: made of pictures here, read by a ControlNet that `attachments` applies.

A control is made at the size at which the ControlNets learned to read it for a picture as large as the one given: three
quarters of it, in whole cells of Stage C's latent. For a picture of another size it is resized when it is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .control import (
    CONTROL_KINDS,
    Faces,
    canny,
    canny_control,
    control_picture,
    embedding_width,
    identity_control,
    inpainting_control,
    map_picture,
    super_resolution_control,
    with_boxes,
)
from .control.canny import HIGH, LOW, REFERENCE_SIDE
from .handles import StageHandle
from .masks import fitting_masks
from .sizes import ENCODER_COMPRESSION, stage_c_size
from .stages import preview_latent
from .threads import threads_for
from .wires import Latent

# Edges of larger pictures are looked for in the picture made smaller: the ControlNet learned from such.
_LARGEST_FOR_EDGES = 1024


@dataclass(frozen=True, eq=False)
class ControlInput:
    """The value of a `CASCADE_CONTROL` wire: what one ControlNet reads.

    kind: a name of `control.CONTROL_KINDS`. samples: float32 ``[n, c, H, W]``: pixels for ``canny`` (1 channel, edges
    0..1) and ``inpainting`` (4: the picture with white holes, the mask); one cell per 32 pixels for
    ``super_resolution`` (16) and ``identity`` (as the embeddings, 512 for ArcFace). size: ``(height, width)`` of the
    picture that it is of, whose shape counts; None is that of the samples. family: of the weights that made them, as in
    `wires.Latent`.
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
        """What a person can see of pixels, an `IMAGE` ``[n, H, W, 3]``: edges, or the picture with its holes."""
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
    size = stage_c_size(height, width)
    small = control_picture(fitting_masks(mask, count, height, width), *size)
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


@torch.no_grad()
def shown_by_previewer(control: ControlInput, previewer: StageHandle) -> Tensor:
    """What the cells ``h x w`` of a super-resolution control still know of its picture: ``[n, 8 h, 8 w, 3]``, 0..1."""
    return preview_latent(previewer, Latent(control.samples, family=control.family))


@torch.no_grad()
def identity_input(faces: Sequence[Faces], width: int = 0, height: int = 0) -> tuple[ControlInput, Tensor]:
    """The embeddings of faces at their places, and an `IMAGE` ``[n, H, W, 3]`` of the map and the boxes.

    faces: one entry per picture. width, height: of the picture to make, in pixels. 0 takes that of the pictures with
    the faces, and with one of them the other in their shape; in another shape, the middle of those pictures counts.

    Raises:
        ValueError: pictures of several sizes without one to take, or no face in any picture or in what is left of it.
    """
    channels = embedding_width(faces)
    if not channels:
        raise ValueError(
            f"There is no face in {_pictures(faces)}, expected at least one: choose a picture with a face, or lower "
            "the threshold of the node that finds them."
        )
    width, height = _size_of(faces, width, height)
    placed = [found.cropped(width, height) for found in faces]
    rows, columns = stage_c_size(height, width)
    maps = identity_control(placed, rows * ENCODER_COMPRESSION, columns * ENCODER_COMPRESSION, channels)
    if not maps.any():
        raise ValueError(
            f"No face is inside of the middle of {_pictures(faces)} in the shape of {width} x {height}: make a picture "
            f"of their shape ({faces[0].width} x {faces[0].height}), or crop them around the face first."
        )
    shown = with_boxes(map_picture(maps, ENCODER_COMPRESSION), placed)
    return ControlInput("identity", maps, (height, width)), shown


def _size_of(faces: Sequence[Faces], width: int, height: int) -> tuple[int, int]:
    sizes = {(found.width, found.height) for found in faces}
    if not (width and height) and len(sizes) > 1:
        raise ValueError(
            f"The faces are of pictures of {' and '.join(f'{w} x {h}' for w, h in sorted(sizes))}, expected one size "
            "for all: give the width and height of the picture to make."
        )
    own_width, own_height = faces[0].width, faces[0].height
    if width or height:
        own_width, own_height = (
            width or max(1, round(height * own_width / own_height)),
            height or max(1, round(width * own_height / own_width)),
        )
    return own_width, own_height


def _pictures(faces: Sequence[Faces]) -> str:
    return "the picture" if len(faces) == 1 else f"any of the {len(faces)} pictures"


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
