"""Bringing a face upright and to its place in the small picture that a face recogniser reads.

ArcFace (Deng et al. 2019) reads 112 x 112 pixels in which the eyes, the tip of the nose and the corners of the mouth
are as near as they get to five fixed points. The transform that takes them there is the similarity (rotation, one
scale, shift; no mirroring) with the least squared error: Umeyama, "Least-squares estimation of transformation
parameters between two point patterns" (1991).

Coordinates are pixels, and a pixel's centre lies at its whole number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RECOGNISER_SIDE = 112

# Left eye, right eye (as seen in the picture), tip of the nose, left and right corner of the mouth; from ArcFace.
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
# Where the box of an upright face lies in that picture: its eyes are at about .39 of its height, its mouth at .78.
_BOX_CENTRE, _BOX_HEIGHT = (56.0, 63.0), 104.0


def similarity(points: Tensor, targets: Tensor) -> Tensor:
    """The similarities that take points nearest to targets, in the sense of least squares.

    points, targets: ``[N, P, 2]`` or ``[P, 2]`` as (x, y), P >= 2; targets may lack N. Returns ``[N, 2, 3]`` float64:
    ``matrix[:, :, :2] @ point + matrix[:, :, 2]``.

    In a plane, a rotation with a scale multiplies ``x + iy`` by one complex number, and the best one is a quotient of
    sums. It is Umeyama's solution, which for any dimension comes from a singular value decomposition.

    Raises:
        ValueError: the points of one face are all the same.
    """
    points = points.double().reshape(-1, *points.shape[-2:])
    targets = targets.double().expand_as(points)
    middle, target_middle = points.mean(dim=1), targets.mean(dim=1)
    from_middle, to_middle = points - middle[:, None], targets - target_middle[:, None]
    spread = from_middle.square().sum(dim=(1, 2))
    if (spread <= 0).any():
        raise ValueError(
            "The five points of a face are all in one place, expected eyes, nose and corners of the mouth: use another "
            "face detector."
        )
    along = (from_middle * to_middle).sum(dim=(1, 2)) / spread
    across = (from_middle[..., 0] * to_middle[..., 1] - from_middle[..., 1] * to_middle[..., 0]).sum(dim=1) / spread
    linear = torch.stack([torch.stack([along, -across], dim=1), torch.stack([across, along], dim=1)], dim=1)
    shift = target_middle - (linear @ middle[..., None])[..., 0]
    return torch.cat([linear, shift[..., None]], dim=2)


def from_boxes(boxes: Tensor) -> Tensor:
    """The same for faces of which only boxes ``[N, 4]`` (left, top, right, bottom) are known, taken to be upright."""
    boxes = boxes.double()
    scale = _BOX_HEIGHT / (boxes[:, 3] - boxes[:, 1]).clamp(min=1.0)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    shift = torch.tensor(_BOX_CENTRE, dtype=torch.float64) - scale[:, None] * centre
    linear = scale[:, None, None] * torch.eye(2, dtype=torch.float64)
    return torch.cat([linear, shift[..., None]], dim=2)


def aligned(picture: Tensor, transforms: Tensor, side: int = RECOGNISER_SIDE) -> Tensor:
    """The faces of ``picture [3, H, W]``, each moved by its similarity: ``[N, 3, side, side]`` float32.

    transforms: ``[N, 2, 3]``, from the picture's pixels to those of the result; those for 112 pixels are scaled to
    `side`. Bilinear without smoothing, as recognisers were trained; outside of the picture is black.
    """
    height, width = picture.shape[-2:]
    scale = side / RECOGNISER_SIDE
    linear, shift = scale * transforms[:, :, :2].double(), scale * transforms[:, :, 2].double()
    axis = torch.arange(side, dtype=torch.float64)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)
    # Each pixel of the result is looked up where the inverse takes it.
    sources = torch.linalg.solve(linear, (places[None] - shift[:, None]).transpose(1, 2)).transpose(1, 2)
    size = torch.tensor([width, height], dtype=torch.float64)
    grid = ((2 * sources + 1) / size - 1).reshape(-1, side, side, 2).float()
    pictures = picture[None].float().expand(len(grid), -1, -1, -1)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
