"""What the adapters of the tiny family are measured with: scenes, prompts, controls and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cascade_ops.control import (
    Faces,
    canny,
    canny_control,
    control_picture,
    identity_control,
    inpainting_control,
    super_resolution_control,
)
from ..cascade_ops.models import LatentEncoder
from .drawing import COLOURS, HELD_OUT_PAIRS, SHAPES, Scene
from .family import ENCODE_SIZE, IMAGE_SIZE, STAGE_C_SIZE, as_images
from .objects import WIDTH, faces_of

# Around an object's box, so that nothing of it is left.
_MARGIN = 0.05
# Edges count as found within this many pixels of a picture of EDGE_SIDE.
EDGE_SIDE, _EDGE_REACH = 128, 2


def control_input(pictures: np.ndarray) -> Tensor:
    """uint8 pictures ``[N, 256, 256, 3]`` at the size that a control is made of."""
    return control_picture(as_images(pictures), STAGE_C_SIZE, STAGE_C_SIZE)


def edges_of(pictures: np.ndarray) -> Tensor:
    return canny_control(control_input(pictures))


def masked(pictures: np.ndarray, masks: np.ndarray) -> Tensor:
    """The inpainting control; masks bool ``[N, 256, 256]``, True is made anew."""
    mask = F.interpolate(torch.from_numpy(masks)[:, None].float(), size=(ENCODE_SIZE, ENCODE_SIZE), mode="nearest")
    return inpainting_control(control_input(pictures), mask)


def enlarged(encoder: LatentEncoder, pictures: np.ndarray) -> Tensor:
    """The super-resolution control of smaller pictures ``[N, s, s, 3]``."""
    half = ENCODE_SIZE // 2
    small = F.interpolate(as_images(pictures), size=(half, half), mode="bilinear", antialias=True)
    return super_resolution_control(encoder, small)


def identities(scenes: Sequence[Scene]) -> Tensor:
    """The identity control of the objects of scenes."""
    faces = []
    for scene in scenes:
        found = faces_of(scene, IMAGE_SIZE)
        boxes = torch.tensor([face["box"] for face in found["faces"]])
        embeddings = torch.tensor([face["embedding"] for face in found["faces"]])
        faces.append(Faces(boxes, embeddings, IMAGE_SIZE, IMAGE_SIZE))
    return identity_control(faces, ENCODE_SIZE, ENCODE_SIZE, WIDTH)


def object_mask(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Bool ``[size, size]``, True in the boxes of the objects and a little around them."""
    mask = np.zeros((size, size), dtype=bool)
    for item in scene.objects:
        left, top = (max(0, int((value - _MARGIN) * size)) for value in item.box[:2])
        right, bottom = (min(size, int((value + _MARGIN) * size) + 1) for value in item.box[2:])
        mask[top:bottom, left:right] = True
    return mask


def other_object(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another colour and another shape of its one object, a pair that training shows."""
    item = scene.objects[0]
    used = {scene.background, scene.second, item.colour}
    while True:
        colour = str(rng.choice([name for name in COLOURS if name not in used]))
        shape = str(rng.choice([name for name in SHAPES if name != item.shape]))
        if (colour, shape) not in HELD_OUT_PAIRS:
            return replace(scene, objects=(replace(item, colour=colour, shape=shape, rgb=COLOURS[colour]),))


def edge_f1(pictures: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 of the edges of pictures against those of the true ones, both found by Canny's detector at EDGE_SIDE."""

    def edges(images: np.ndarray) -> Tensor:
        size = (EDGE_SIDE, EDGE_SIDE)
        return canny(F.interpolate(as_images(images), size=size, mode="bilinear", antialias=True))

    def near(found: Tensor) -> Tensor:
        return F.max_pool2d(found, 2 * _EDGE_REACH + 1, stride=1, padding=_EDGE_REACH)

    found, wanted = edges(pictures), edges(truth)
    count, true = found.sum(dim=(1, 2, 3)), wanted.sum(dim=(1, 2, 3))
    precision = (found * near(wanted)).sum(dim=(1, 2, 3)) / count.clamp(min=1)
    recall = (wanted * near(found)).sum(dim=(1, 2, 3)) / true.clamp(min=1)
    return float((2 * precision * recall / (precision + recall).clamp(min=1e-6)).mean())


def psnr_where(pictures: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB of the pixels that bool ``where [N, H, W]`` keeps."""
    square = (((pictures.astype(np.float64) - truth) / 255) ** 2).mean(axis=-1)
    error = (square * where).sum(axis=(1, 2)) / where.sum(axis=(1, 2))
    return float((-10 * np.log10(np.maximum(error, 1e-9))).mean())
