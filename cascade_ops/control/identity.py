"""Face identity: embeddings of faces, painted where the faces are.

The reference's ControlNet reads a map of a 32nd of the picture's size that holds each face's embedding (ArcFace, 512
numbers; Deng et al. 2019) inside the face's box, and zeros elsewhere. Faces are found and embedded by other programs;
their results come in a file with the pictures' names:

* ``.jsonl``: one line per picture,
  ``{"name": "anna.jpg", "width": 1024, "height": 768, "faces": [{"box": [...], "embedding": [...]}]}``, a box being
  left, top, right, bottom;
* ``.safetensors``: for each picture ``<name>.boxes [N, 4]``, ``<name>.embeddings [N, C]`` and ``<name>.size [2]``
  (width, height).

Boxes are in pixels of that picture, which is whole. A picture without a face has an empty list, or tensors of length 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sizes import ENCODER_COMPRESSION

MAX_FACES = 4


@dataclass(frozen=True, eq=False)
class Faces:
    """The faces of one picture.

    boxes: ``[N, 4]``, left, top, right, bottom in pixels. embeddings: ``[N, C]``, of any length; their direction
    counts. width, height: of the picture in pixels.
    """

    boxes: Tensor
    embeddings: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        boxes, embeddings = self.boxes.shape, self.embeddings.shape
        if len(boxes) != 2 or boxes[1] != 4 or len(embeddings) != 2 or boxes[0] != embeddings[0]:
            raise ValueError(
                f"Faces have boxes of shape {list(boxes)} and embeddings of shape {list(embeddings)}, expected [N, 4] "
                "and [N, C] with the same number of faces: give one box and one embedding per face."
            )
        if self.width < 1 or self.height < 1:
            raise ValueError(
                f"Faces lie in a picture of {self.width} x {self.height}, expected at least 1 x 1: give its size."
            )

    def cropped(self, width: int, height: int) -> Faces:
        """These faces in the picture of this size that is cut from the middle after scaling to cover it."""
        scale = max(width / self.width, height / self.height)
        shift = torch.tensor([(self.width * scale - width) / 2, (self.height * scale - height) / 2] * 2)
        return replace(self, boxes=self.boxes.float() * scale - shift, width=width, height=height)


def identity_control(faces: Sequence[Faces], height: int, width: int, channels: int = 512) -> Tensor:
    """The control of an identity ControlNet: ``[B, channels, height / 32, width / 32]`` float32.

    Every cell that a face's box touches holds its embedding at unit length. The four largest faces of a picture count,
    and where they overlap the smaller one is seen.

    Args:
        faces: one entry per picture, in pictures of any size; boxes are taken relative to it.
        height, width: of the control picture in pixels, which `control_picture` gives.

    Raises:
        ValueError: embeddings of another width.
    """
    rows, columns = math.ceil(height / ENCODER_COMPRESSION), math.ceil(width / ENCODER_COMPRESSION)
    maps = torch.zeros(len(faces), channels, rows, columns)
    for index, found in enumerate(faces):
        if len(found.boxes) and found.embeddings.shape[1] != channels:
            raise ValueError(
                f"The face embeddings have {found.embeddings.shape[1]} numbers and the ControlNet reads {channels}: "
                "use the face recognition model that it was trained with."
            )
        cells = found.boxes.float() / torch.tensor([found.width / columns, found.height / rows] * 2)
        # Rounding errors of a box that ends on a cell's border must not reach the next cell.
        spans = torch.cat([(cells[:, :2] + 1e-3).floor(), (cells[:, 2:] - 1e-3).ceil()], dim=1)
        left, top = spans[:, 0].clamp(0, columns), spans[:, 1].clamp(0, rows)
        right, bottom = spans[:, 2].clamp(0, columns), spans[:, 3].clamp(0, rows)
        area = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
        vectors = F.normalize(found.embeddings.float(), dim=1)
        for face in area.argsort(descending=True, stable=True)[:MAX_FACES].tolist():
            y, x = slice(int(top[face]), int(bottom[face])), slice(int(left[face]), int(right[face]))
            maps[index, :, y, x] = vectors[face][:, None, None]
    return maps


def read_faces(path: str | Path) -> dict[str, Faces]:
    """Read a file of faces by picture name; see above for both formats.

    Raises:
        ValueError: not there, another kind of file, or an entry that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}, expected face embeddings as .jsonl or .safetensors: correct it.")
    if path.suffix == ".jsonl":
        return _from_lines(path)
    if path.suffix == ".safetensors":
        return _from_tensors(path)
    raise ValueError(f"{path.name} has face embeddings in a format that is not known, expected .jsonl or .safetensors.")


def write_faces(path: str | Path, faces: Mapping[str, Faces]) -> Path:
    """Write faces by picture name as a ``.safetensors`` file that `read_faces` reads; the path."""
    from safetensors.torch import save

    path = Path(path)
    tensors = {}
    for name, found in faces.items():
        tensors[f"{name}.boxes"] = found.boxes.float().clone(memory_format=torch.contiguous_format)
        tensors[f"{name}.embeddings"] = found.embeddings.float().clone(memory_format=torch.contiguous_format)
        tensors[f"{name}.size"] = torch.tensor([found.width, found.height])
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(save(tensors))
    os.replace(partial, path)
    return path


def faces_of(faces: Mapping[str, Faces], name: str) -> Faces:
    """The faces of the picture called `name`: by that name, by its file name, or without the ending of either.

    Raises:
        ValueError: it has no entry.
    """
    for key in (name, Path(name).name, Path(name).stem):
        if key in faces:
            return faces[key]
    without_ending = [key for key in faces if Path(key).stem == name]
    if len(without_ending) == 1:
        return faces[without_ending[0]]
    raise ValueError(
        f"The face embeddings have no entry for the picture '{name}' (they have {len(faces)}, such as "
        f"'{next(iter(faces), '')}'): add it, with an empty list where it has no face."
    )


def _from_lines(path: Path) -> dict[str, Faces]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            listed = entry["faces"]
            boxes, vectors = torch.zeros(0, 4), torch.zeros(0, 1)
            if listed:
                boxes = torch.tensor([face["box"] for face in listed], dtype=torch.float32)
                vectors = torch.tensor([face["embedding"] for face in listed], dtype=torch.float32)
            found[str(entry["name"])] = Faces(boxes, vectors, int(entry["width"]), int(entry["height"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path.name} line {number} cannot be read ({error}), expected name, width, height and faces with box "
                "and embedding: correct it."
            ) from error
    return found


def _from_tensors(path: Path) -> dict[str, Faces]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file ({error}): write the face embeddings again.") from error
    found = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part not in ("boxes", "embeddings", "size") or not all(
            f"{name}.{part}" in tensors for part in ("boxes", "embeddings", "size")
        ):
            raise ValueError(
                f"{path.name} has the tensor '{key}', expected for each picture <name>.boxes, <name>.embeddings and "
                "<name>.size: write the face embeddings again."
            )
        if part == "size":
            width, height = (int(side) for side in tensors[key])
            found[name] = Faces(tensors[f"{name}.boxes"], tensors[f"{name}.embeddings"], width, height)
    return found
