"""Finding and embedding faces with the user's own ONNX files, for face identity.

A detector (SCRFD) says where faces are, `alignment` brings each upright into the small picture that a recogniser
(ArcFace) reads, and `find_faces` gives the `control.Faces` of every picture. onnxruntime, which runs the files, is
imported when the first file is opened.
"""

from .alignment import RECOGNISER_SIDE, aligned, similarity
from .detector import Detection, FaceDetector
from .finding import find_faces
from .recogniser import FaceRecogniser
from .sessions import Network

__all__ = [
    "RECOGNISER_SIDE",
    "Detection",
    "FaceDetector",
    "FaceRecogniser",
    "Network",
    "aligned",
    "find_faces",
    "similarity",
]
