"""Faces with their embeddings, of whole pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..control import Faces
from .alignment import TEMPLATE, aligned, from_boxes, similarity
from .detector import Detection, FaceDetector
from .recogniser import FaceRecogniser


@torch.no_grad()
def find_faces(
    pictures: Tensor,
    detector: FaceDetector,
    recogniser: FaceRecogniser,
    threshold: float = 0.5,
    callback: Callable[[int], None] | None = None,
) -> tuple[Faces, ...]:
    """The faces of each of ``pictures [B, 3, H, W]``, RGB 0..1 in main memory, best first; a picture may have none.

    threshold: score from which something counts as a face, 0..1. callback: gets the number of pictures that are done.
    """
    found = []
    for picture in pictures:
        detection = detector.find(picture, threshold)
        upright = aligned(picture, _transforms(detection)) if len(detection.boxes) else picture.new_zeros(0, 3, 1, 1)
        embeddings = recogniser.embed(upright)
        found.append(Faces(detection.boxes, embeddings, picture.shape[-1], picture.shape[-2]))
        if callback is not None:
            callback(len(found))
    return tuple(found)


def _transforms(detection: Detection) -> Tensor:
    """To the recogniser's picture, ``[N, 2, 3]``: by the five points, or by the boxes where there are none."""
    if detection.points is None:
        return from_boxes(detection.boxes)
    return similarity(detection.points, TEMPLATE)
