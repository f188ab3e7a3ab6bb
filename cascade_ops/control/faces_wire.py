"""Faces as they travel between nodes, which nodes of other packs may make too.

The value of a `CASCADE_FACES` wire is a list or tuple with one entry per picture: a `Faces`, or a dict with the same
four names, ``{"boxes": [[left, top, right, bottom], ...], "embeddings": [[...], ...], "width": 1024, "height": 768}``,
whose boxes and embeddings are tensors, arrays or nested lists. Both are empty for a picture without a face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .identity import Faces

_PARTS = ("boxes", "embeddings", "width", "height")
_EXPECTED = (
    "expected a list with one entry per picture: boxes [N, 4] in pixels, embeddings [N, C], width and height of it"
)


def as_faces(value: object) -> tuple[Faces, ...]:
    """The value of a `CASCADE_FACES` wire, checked: one `Faces` per picture.

    Raises:
        ValueError: it is something else, a number in it is not finite, a box is empty or upside down, or the embeddings
            of two pictures differ in length.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(
            f"The faces input holds {type(value).__name__}, {_EXPECTED}: connect 'Cascade: load faces' or another node "
            "that finds faces."
        )
    if not value:
        raise ValueError(f"The faces input is an empty list, {_EXPECTED}: connect a node that gives faces.")
    faces = tuple(_one(entry, f"picture {number}") for number, entry in enumerate(value, 1))
    embedding_width(faces)
    return faces


def embedding_width(faces: Sequence[Faces]) -> int:
    """How many numbers the embeddings of these pictures have; 0 where no picture has a face.

    Raises:
        ValueError: pictures differ in it.
    """
    widths = {found.embeddings.shape[1] for found in faces if len(found.boxes)}
    if len(widths) > 1:
        raise ValueError(
            f"The face embeddings have {' and '.join(map(str, sorted(widths)))} numbers, expected the same for all "
            "pictures: find all faces with one recogniser."
        )
    return widths.pop() if widths else 0


def _one(entry: object, where: str) -> Faces:
    if isinstance(entry, Mapping):
        entry = _from_mapping(entry, where)
    if not isinstance(entry, Faces):
        raise ValueError(
            f"The faces of {where} are {type(entry).__name__}, expected boxes, embeddings, width and height: give a "
            "dict of these."
        )
    boxes = entry.boxes
    if not bool(torch.isfinite(boxes).all()) or not bool(torch.isfinite(entry.embeddings).all()):
        raise ValueError(
            f"The faces of {where} have numbers that are not finite, expected boxes in pixels and embeddings: find "
            "them again."
        )
    if bool((boxes[:, 2:] <= boxes[:, :2]).any()):
        wrong = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(dim=1)][0].tolist()
        raise ValueError(
            f"The faces of {where} have the box {wrong}, expected left, top, right, bottom, with right above left and "
            "bottom above top: correct its order (other tools give left, top, width, height)."
        )
    return entry


def _from_mapping(entry: Mapping, where: str) -> Faces:
    missing = [name for name in _PARTS if name not in entry]
    if missing:
        raise ValueError(
            f"The faces of {where} lack {', '.join(missing)}, {_EXPECTED}: add what is missing, empty lists where "
            "there is no face."
        )
    try:
        boxes, embeddings = (_numbers(entry[name]) for name in _PARTS[:2])
        width, height = (int(entry[name]) for name in _PARTS[2:])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The faces of {where} cannot be read ({error}), {_EXPECTED}: correct them.") from error
    if not boxes.numel():  # An empty list has no sides.
        boxes = boxes.reshape(0, 4)
    if not embeddings.numel():
        embeddings = embeddings.reshape(0, max(1, embeddings.shape[-1]))
    return Faces(boxes, embeddings, width, height)


def _numbers(value: object) -> Tensor:
    return torch.as_tensor(value).detach().float().cpu()
