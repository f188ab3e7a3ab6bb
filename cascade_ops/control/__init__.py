"""What turns a picture into the control that a ControlNet reads.

``canny_control``, ``inpainting_control``, ``super_resolution_control`` and ``identity_control`` make one from pictures,
masks or faces; ``CONTROL_KINDS`` says what each kind reads and needs.
"""

from .canny import canny, canny_control
from .identity import Faces, faces_of, identity_control, read_faces, write_faces
from .inpainting import inpainting_control, random_masks
from .kinds import CONTROL_KINDS, ControlKind
from .pictures import control_picture
from .super_resolution import smaller_picture, super_resolution_control

__all__ = [
    "CONTROL_KINDS",
    "ControlKind",
    "Faces",
    "canny",
    "canny_control",
    "control_picture",
    "faces_of",
    "identity_control",
    "inpainting_control",
    "random_masks",
    "read_faces",
    "smaller_picture",
    "super_resolution_control",
    "write_faces",
]
