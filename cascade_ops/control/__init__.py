"""What turns a picture into the control that a ControlNet reads.

``canny_control``, ``inpainting_control``, ``super_resolution_control`` and ``identity_control`` make one from pictures,
masks or faces; ``CONTROL_KINDS`` says what each kind reads and needs.
"""

from .canny import canny, canny_control
from .faces_wire import as_faces, embedding_width
from .identity import Faces, faces_of, identity_control, read_faces, write_faces
from .inpainting import inpainting_control, random_masks
from .kinds import CONTROL_KINDS, ControlKind
from .pictures import control_picture
from .show_faces import map_picture, with_boxes
from .super_resolution import smaller_picture, super_resolution_control

__all__ = [
    "CONTROL_KINDS",
    "ControlKind",
    "Faces",
    "as_faces",
    "canny",
    "canny_control",
    "control_picture",
    "embedding_width",
    "faces_of",
    "identity_control",
    "inpainting_control",
    "map_picture",
    "random_masks",
    "read_faces",
    "smaller_picture",
    "super_resolution_control",
    "with_boxes",
    "write_faces",
]
