"""Who a face is: ArcFace, from an ONNX file such as InsightFace's ``w600k_r50.onnx``.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (2019). The network reads an upright face
of 112 x 112 pixels and gives a vector, 512 long in the published ones, whose direction says who it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .alignment import RECOGNISER_SIDE
from .sessions import Network


class FaceRecogniser:
    """ArcFace from an ONNX file. side: of the pictures that it reads.

    Raises:
        ValueError: the file is no such recogniser.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        if not is_recogniser(self.network):
            raise ValueError(
                f"{self.network.name} {self.network.describe()}, expected a face recogniser, which reads "
                f"{RECOGNISER_SIDE} x {RECOGNISER_SIDE} and gives one embedding: choose one such as w600k_r50.onnx of "
                "InsightFace's buffalo_l."
            )

    def embed(self, faces: Tensor) -> Tensor:
        """Embeddings ``[N, C]`` of upright faces ``[N, 3, 112, 112]``, RGB 0..1; not normalised."""
        shown = ((faces * 255 - 127.5) / 127.5).float()
        # One at a time: files are often made for a single face.
        found = [torch.from_numpy(self.network.run(face[None].numpy())[0]).float().reshape(1, -1) for face in shown]
        if not found:
            return torch.zeros(0, self.network.outputs[0][-1] or 1)
        return torch.cat(found)


def is_recogniser(network: Network) -> bool:
    """Whether the file has the input and the output of ArcFace."""
    sides = (RECOGNISER_SIDE, None)
    shape = network.shape
    fits = len(shape) == 4 and shape[1] in (3, None) and shape[2] in sides and shape[3] in sides
    return fits and network.inputs == 1 and len(network.outputs) == 1 and len(network.outputs[0]) == 2
