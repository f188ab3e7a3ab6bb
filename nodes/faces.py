"""Nodes for faces: reading embeddings that are there, finding faces, and what an identity ControlNet reads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade_ops.catalog import AUTO, fingerprint
from . import runtime
from .control import CATEGORY, made
from .examples import FOLDER as EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..cascade_ops.faces.sessions import Network

EXAMPLE = "faces.jsonl (bundled)"
_ENDINGS = (".jsonl", ".safetensors")
_MODELS = "insightface"
# Of several fitting files, auto takes one of these first; the others in the order of their names.
_DETECTORS = ("det_10g.onnx", "scrfd_10g_bnkps.onnx")
_RECOGNISERS = ("w600k_r50.onnx", "glintr100.onnx")


class CascadeLoadFaces:
    DESCRIPTION = (
        "Loads the faces of a picture from a file: where they are, and the embedding that says who each one is. Such a "
        "file comes from another program, or belongs to the pictures that an identity ControlNet was trained on."
    )
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("CASCADE_FACES",)
    RETURN_NAMES = ("faces",)
    OUTPUT_TOOLTIPS = ("The faces, for 'Cascade: face identity control'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "file": (
                    [EXAMPLE, *_face_files()],
                    {
                        "default": EXAMPLE,
                        "tooltip": "A .jsonl or .safetensors file of the input folder. The bundled one has the objects "
                        "of the example pictures, which the tiny ControlNet knows instead of faces.",
                    },
                ),
                "picture": (
                    "STRING",
                    {
                        "default": "circle",
                        "tooltip": "Whose faces: a picture's name in the file, with or without its ending. Empty takes "
                        "all pictures of the file, as a batch.",
                    },
                ),
            }
        }

    def load(self, file: str, picture: str) -> dict[str, Any]:
        from ..cascade_ops.control import as_faces, faces_of, read_faces

        known = read_faces(_face_path(file))
        name = picture.strip()
        faces = as_faces([faces_of(known, name)] if name else list(known.values()))
        return {"ui": {"text": [_counted(faces)]}, "result": (faces,)}

    @classmethod
    def IS_CHANGED(cls, file: str, **settings: object) -> str:
        return fingerprint(str(_face_path(file)))


class CascadeDetectFaces:
    DESCRIPTION = (
        "Finds the faces in a picture and says who each one is, with two files of InsightFace (or others of the kinds "
        "SCRFD and ArcFace). Needs the package onnxruntime."
    )
    CATEGORY = CATEGORY
    FUNCTION = "detect"
    RETURN_TYPES = ("CASCADE_FACES", "IMAGE")
    RETURN_NAMES = ("faces", "image")
    OUTPUT_TOOLTIPS = (
        "The faces of every picture, for 'Cascade: face identity control'.",
        "The pictures with a frame around each face, to look at. Faces that look alike have frames of like colours.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [AUTO, *runtime.model_files(_MODELS)]

        def file(what: str, examples: tuple[str, ...]) -> tuple:
            tooltip = (
                f"The ONNX file that {what}, below models/{_MODELS}. auto takes {' or '.join(examples)} if it is "
                "there, else the first file that can do it, by looking into the files."
            )
            return (names, {"default": AUTO, "tooltip": tooltip})

        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture with faces; several in a batch are looked at one by one."}),
                "detector": file("finds faces", _DETECTORS),
                "recogniser": file("says who a face is", _RECOGNISERS),
                "threshold": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.01,
                        "max": 1.0,
                        "step": 0.01,
                        "round": 0.001,
                        "tooltip": "How sure the detector must be. Lower finds small and hidden faces, and more that "
                        "are none.",
                    },
                ),
            }
        }

    def detect(self, image: Tensor, detector: str, recogniser: str, threshold: float) -> dict[str, Any]:
        from ..cascade_ops.control import with_boxes
        from ..cascade_ops.control_inputs import as_channels_first
        from ..cascade_ops.faces import FaceDetector, FaceRecogniser, find_faces
        from ..cascade_ops.faces.detector import is_detector
        from ..cascade_ops.faces.recogniser import is_recogniser

        pictures = as_channels_first(image)
        runtime.check_interrupted()
        finder = FaceDetector(_network(detector, "detector", _DETECTORS, is_detector))
        reader = FaceRecogniser(_network(recogniser, "recogniser", _RECOGNISERS, is_recogniser))
        bar = runtime.progress(len(pictures))

        def done(count: int) -> None:
            bar.update(count)
            runtime.check_interrupted()

        faces = find_faces(pictures, finder, reader, threshold, done)
        said = f"{_counted(faces)}, by {finder.network.name} and {reader.network.name}"
        shown = with_boxes(pictures.permute(0, 2, 3, 1), faces)
        return {"ui": {"text": [said]}, "result": (faces, shown)}

    @classmethod
    def IS_CHANGED(cls, detector: str, recogniser: str, **settings: object) -> str:
        names = runtime.model_files(_MODELS) if AUTO in (detector, recogniser) else [detector, recogniser]
        return "; ".join(fingerprint(runtime.model_path(_MODELS, name)) for name in names)


class CascadeFaceIdentityControl:
    DESCRIPTION = (
        "Puts faces at their places, for a face identity ControlNet: the new picture shows the same people there. "
        "What is around them, the prompt says."
    )
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("CASCADE_CONTROL", "IMAGE")
    RETURN_NAMES = ("control", "image")
    OUTPUT_TOOLTIPS = (
        "The faces at their places, for 'Cascade: apply ControlNet' with a face identity ControlNet.",
        "What the ControlNet reads, to look at: cells with a face have its colour, free ones are black, and frames "
        "show the faces themselves.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def side(name: str) -> tuple:
            tooltip = (
                f"{name} of the picture to make, in pixels. 0 takes that of the picture with the faces, or what its "
                "shape gives; for another shape its middle is taken."
            )
            return ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": tooltip})

        return {
            "required": {
                "faces": (
                    "CASCADE_FACES",
                    {
                        "tooltip": "The faces, from 'Cascade: detect faces' or 'Cascade: load faces'. Of one picture, "
                        "or of one for each that is made; the four largest of each count."
                    },
                ),
                "width": side("Width"),
                "height": side("Height"),
            }
        }

    def make(self, faces: Any, width: int, height: int) -> dict[str, Any]:
        from ..cascade_ops.control import as_faces
        from ..cascade_ops.control_inputs import identity_input

        checked = as_faces(faces)
        control, shown = identity_input(checked, width, height)
        cells = control.samples.any(dim=1)
        remark = (
            f"{_counted(checked)}, {control.samples.shape[1]} numbers each, in {int(cells.sum())} of {cells.numel()} "
            "cells"
        )
        return made(control, shown, remark)


def _face_files() -> list[str]:
    directory = runtime.input_directory()
    if not os.path.isdir(directory):
        return []
    return sorted(entry.name for entry in os.scandir(directory) if entry.is_file() and entry.name.endswith(_ENDINGS))


def _face_path(file: str) -> Path:
    """Only names that the list holds, so that a graph cannot name any other path."""
    if file == EXAMPLE:
        return EXAMPLES / "faces.jsonl"
    if file not in _face_files():
        raise ValueError(
            f"There is no file {file!r} with faces in {runtime.input_directory()}, expected a .jsonl or .safetensors "
            "file there: put it there, or choose another one."
        )
    return Path(runtime.input_directory(), file)


def _network(choice: str, what: str, preferred: tuple[str, ...], fits: Callable[[Network], bool]) -> Network:
    """The detector or recogniser that a choice stands for; ValueError where there is none."""
    from ..cascade_ops.faces import Network
    from ..cascade_ops.faces.sessions import onnxruntime

    if choice != AUTO:
        return Network(runtime.model_path(_MODELS, choice))

    def order(name: str) -> int:
        last = name.rsplit("/", 1)[-1]
        return preferred.index(last) if last in preferred else len(preferred)

    onnxruntime()  # Without it no file could be opened, which would look as if there were none.
    for name in sorted(runtime.model_files(_MODELS), key=order):
        runtime.check_interrupted()
        with contextlib.suppress(ValueError):
            network = Network(runtime.model_path(_MODELS, name))
            if fits(network):
                return network
    raise ValueError(
        f"No face {what} was found in {runtime.model_directory(_MODELS)}, expected {preferred[0]} of InsightFace's "
        f"buffalo_l or another one of its kind: put it below that folder, such as models/buffalo_l/{preferred[0]}."
    )


def _counted(faces: Any) -> str:
    """In words: ``1 face in 1 picture of 256 x 256``."""
    count = sum(len(found.boxes) for found in faces)
    sizes = " and ".join(dict.fromkeys(f"{found.width} x {found.height}" for found in faces))
    pictures = "1 picture" if len(faces) == 1 else f"{len(faces)} pictures"
    return f"{'1 face' if count == 1 else f'{count} faces'} in {pictures} of {sizes}"
