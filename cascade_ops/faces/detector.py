"""Where the faces of a picture are: SCRFD, from an ONNX file such as InsightFace's ``det_10g.onnx``.

Guo et al., "Sample and Computation Redistribution for Efficient Face Detection" (2021). The network reads a picture
in a square and answers on grids of 8, 16 and 32 pixels (some versions 64 and 128 too). Each cell has one or more
anchors, which lie at the cell's upper left corner, and of each the network says a score in 0..1, the distances from the
anchor to the four sides of the face's box and, in most versions, where five points of the face are. Distances are in
cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .sessions import Network

SIDE = 640
FIRST_STRIDE = 8
# Boxes that share more than this much of their area (intersection over union) are of one face.
OVERLAP = 0.4
# What an output is of, by its width: a score, a box, five points.
_SCORE, _BOX, _POINTS = 1, 4, 10


@dataclass(frozen=True, eq=False)
class Detection:
    """The faces of one picture, best first.

    boxes: ``[N, 4]``, left, top, right, bottom in pixels of the picture. scores: ``[N]``, 0..1. points: ``[N, 5, 2]``
    as (x, y): eyes, tip of the nose, corners of the mouth; None where the detector does not say them.
    """

    boxes: Tensor
    scores: Tensor
    points: Tensor | None


class FaceDetector:
    """SCRFD from an ONNX file.

    Raises:
        ValueError: the file is no such detector.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        if not is_detector(self.network):
            raise ValueError(
                f"{self.network.name} {self.network.describe()}, expected a face detector, which reads pictures of any "
                "or one size and gives scores, boxes and mostly points (1, 4 and 10 wide) for three or five grids: "
                "choose one such as det_10g.onnx of InsightFace's buffalo_l."
            )
        height, width = self.network.shape[2:]
        self._size = (height or SIDE, width or SIDE)

    def find(self, picture: Tensor, threshold: float = 0.5) -> Detection:
        """The faces of ``picture [3, H, W]``, RGB 0..1, whose score is at least `threshold`."""
        shown, scale = letterboxed(picture, *self._size)
        outputs = self.network.run(((shown * 255 - 127.5) / 128).numpy())
        boxes, scores, points = self._read(outputs)
        likely = scores >= threshold
        boxes, scores = boxes[likely] / scale, scores[likely]
        kept = kept_boxes(boxes, scores)
        height, width = picture.shape[-2:]
        inside = boxes[kept].clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=boxes.dtype))
        return Detection(inside, scores[kept], None if points is None else points[likely][kept] / scale)

    def _read(self, outputs: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Boxes, scores and points of all anchors, in pixels of the network's picture."""
        kinds: dict[int, list[Tensor]] = {_SCORE: [], _BOX: [], _POINTS: []}
        for output in outputs:
            kinds.get(output.shape[-1], []).append(torch.from_numpy(output).float().reshape(-1, output.shape[-1]))
        counts = [len(kind) for kind in kinds.values()]
        if counts[0] != counts[1] or counts[2] not in (0, counts[0]) or sum(counts) != len(outputs):
            raise ValueError(
                f"{self.network.name} gave outputs {', '.join(str(output.shape[-1]) for output in outputs)} wide, "
                "expected as many scores (1) as boxes (4) and points (10): use a face detector of the kind SCRFD."
            )
        # The finest grid has the most cells, whatever the outputs are called and in whatever order they come.
        levels = [sorted(kind, key=len, reverse=True) for kind in kinds.values()]
        height, width = self._size
        boxes, points = [], []
        for level, (scores, distances) in enumerate(zip(levels[0], levels[1], strict=True)):
            stride = FIRST_STRIDE * 2**level
            rows, columns = -(-height // stride), -(-width // stride)
            anchors = len(scores) // (rows * columns)
            if not anchors or len(scores) != len(distances) or len(scores) != anchors * rows * columns:
                raise ValueError(
                    f"{self.network.name} gives {len(scores)} scores and {len(distances)} boxes for a grid of "
                    f"{columns} x {rows} cells, expected a whole number of each per cell: use a face detector of the "
                    "kind SCRFD."
                )
            centres = grid(rows, columns, stride).repeat_interleave(anchors, dim=0)
            ends = torch.tensor([-1.0, -1.0, 1.0, 1.0]) * distances * stride
            boxes.append(centres.repeat(1, 2) + ends)
            if levels[2]:
                points.append(centres[:, None] + levels[2][level].reshape(-1, 5, 2) * stride)
        return torch.cat(boxes), torch.cat(levels[0])[:, 0], torch.cat(points) if points else None


def is_detector(network: Network) -> bool:
    """Whether the file has the input and the outputs of SCRFD, as far as it says their sizes."""
    widths = [shape[-1] if shape else 0 for shape in network.outputs]
    known = len(widths) in (6, 9, 10, 15) and all(width in (_SCORE, _BOX, _POINTS, None) for width in widths)
    return known and network.inputs == 1 and len(network.shape) == 4 and network.shape[1] in (3, None)


def letterboxed(picture: Tensor, height: int, width: int) -> tuple[Tensor, float]:
    """``picture [3, H, W]`` resized to fit the upper left of ``[1, 3, height, width]``, black elsewhere; its scale."""
    scale = min(height / picture.shape[-2], width / picture.shape[-1])
    rows, columns = (max(1, round(side * scale)) for side in picture.shape[-2:])
    small = F.interpolate(picture[None].float(), size=(rows, columns), mode="bilinear", antialias=scale < 1)
    return F.pad(small.clamp(0, 1), (0, width - columns, 0, height - rows)), scale


def grid(rows: int, columns: int, stride: int) -> Tensor:
    """The anchors' places ``[rows * columns, 2]`` as (x, y), row by row."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float() * stride


def kept_boxes(boxes: Tensor, scores: Tensor, overlap: float = OVERLAP) -> Tensor:
    """Indices of the boxes that stay, best first: each that shares no more than `overlap` with a better one that stays.

    boxes: ``[N, 4]``. scores: ``[N]``. The share is the intersection over the union of two areas.
    """
    order = scores.argsort(descending=True, stable=True)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    area = sides[:, 0] * sides[:, 1]
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        shared = (boxes[rest, 2:].minimum(boxes[best, 2:]) - boxes[rest, :2].maximum(boxes[best, :2])).clamp(min=0)
        both = shared[:, 0] * shared[:, 1]
        order = rest[both <= overlap * (area[rest] + area[best] - both)]
    return torch.stack(kept) if kept else order
