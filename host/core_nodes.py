"""The core nodes that a workflow needs at its ends, with ComfyUI's ids, inputs and meaning.

Written for this host, so that graph files travel both ways; inside ComfyUI its own nodes are used.
"""

from __future__ import annotations

import hashlib
import os
import random
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..nodes import runtime
from .folders import inside, split_annotation
from .pictures import (
    PICTURE_SUFFIXES,
    NumberedFiles,
    alpha_tensor,
    channel_tensor,
    empty_mask,
    image_tensor,
    picture_metadata,
    read_frames,
    to_picture,
    write_png,
)

if TYPE_CHECKING:
    import torch


class _PictureInput:
    """What the two loaders share: a file of the input folder (or another one, as in `a.png [output]`)."""

    @staticmethod
    def _files() -> list[str]:
        directory = runtime.input_directory()
        if not os.path.isdir(directory):
            return []
        return sorted(entry.name for entry in os.scandir(directory) if entry.name.lower().endswith(PICTURE_SUFFIXES))

    @staticmethod
    def _path(image: str) -> Path:
        name, kind = split_annotation(image)
        directory = {
            "input": runtime.input_directory,
            "output": runtime.output_directory,
            "temp": runtime.temp_directory,
        }[kind]()
        path = inside(directory, name)
        if not path.is_file():
            raise ValueError(f"Invalid image file: {image}; put it into {directory} and give its name there")
        return path

    @classmethod
    def IS_CHANGED(cls, image: str) -> str:
        return hashlib.sha256(cls._path(image).read_bytes()).hexdigest()

    @classmethod
    def VALIDATE_INPUTS(cls, image: str | None) -> bool | str:
        if image is None:  # linked: known when the node runs
            return True
        try:
            cls._path(image)
        except ValueError as error:
            return str(error)
        return True


class LoadImage(_PictureInput):
    CATEGORY, FUNCTION = "image", "load_image"
    RETURN_TYPES = ("IMAGE", "MASK")
    OUTPUT_TOOLTIPS = ("The picture; the frames of an animation are a batch.", "Its transparent part (1 - alpha).")
    DESCRIPTION = "Loads a picture from the input folder, turned the way its EXIF data says."
    SEARCH_ALIASES = ["open picture", "input image", "read image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (cls._files(), {"image_upload": True, "tooltip": "A file of the input folder."})}}

    def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        frames = read_frames(self._path(image))
        alphas = [alpha_tensor(frame) for frame in frames]
        masks = [empty_mask() if alpha is None else 1 - alpha for alpha in alphas]
        if len({mask.shape for mask in masks}) > 1:
            # Some frames have transparency and some do not: those without are fully opaque.
            height, width = frames[0].height, frames[0].width
            masks = [torch.zeros(height, width) if alpha is None else 1 - alpha for alpha in alphas]
        return torch.stack([image_tensor(frame) for frame in frames]), torch.stack(masks)


class LoadImageMask(_PictureInput):
    CATEGORY, FUNCTION = "mask", "load_image"
    RETURN_TYPES = ("MASK",)
    OUTPUT_TOOLTIPS = ("The channel as a mask; alpha is inverted, so that transparent is 1.",)
    DESCRIPTION = "Loads one channel of a picture from the input folder as a mask."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (cls._files(), {"image_upload": True, "tooltip": "A file of the input folder."}),
                "channel": (["alpha", "red", "green", "blue"], {"tooltip": "The channel that becomes the mask."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, image: str, channel: str | None = None) -> str:
        return super().IS_CHANGED(image)

    def load_image(self, image: str, channel: str) -> tuple[torch.Tensor]:
        picture = read_frames(self._path(image))[0]
        values = channel_tensor(picture, channel[0].upper())
        return ((1 - values if channel == "alpha" else values).unsqueeze(0),)


class _PictureOutput:
    OUTPUT_NODE = True
    CATEGORY, FUNCTION = "image", "save_images"
    RETURN_TYPES = ()

    def _save(
        self,
        images: torch.Tensor,
        directory: str,
        prefix: str,
        kind: str,
        chunks: dict[str, str],
        compress_level: int,
    ) -> dict[str, Any]:
        files = NumberedFiles(directory, prefix, width=images.shape[2], height=images.shape[1])
        saved = []
        for index, image in enumerate(images):
            path = files.take(index)
            write_png(path, to_picture(image), chunks, compress_level=compress_level)
            saved.append({"filename": path.name, "subfolder": files.subfolder, "type": kind})
        return {"ui": {"images": saved}}


_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


class SaveImage(_PictureOutput):
    DESCRIPTION = "Saves pictures to the output folder as PNG files that carry the graph that made them."
    SEARCH_ALIASES = ["save picture", "output image", "export"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The pictures to save."}),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "ComfyUI",
                        "tooltip": "How the file names begin; may hold sub-folders and tokens such as "
                        "%date:yyyy-MM-dd%, %width% and %height%.",
                    },
                ),
            },
            "hidden": _HIDDEN,
        }

    def save_images(
        self,
        images: torch.Tensor,
        filename_prefix: str = "ComfyUI",
        prompt: dict[str, Any] | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        chunks = picture_metadata(prompt, extra_pnginfo)
        return self._save(images, runtime.output_directory(), filename_prefix, "output", chunks, compress_level=4)


# How the files of previews begin, in the folder for temporary files.
PREVIEW_PREFIX = "ComfyUI_temp_"


class PreviewImage(_PictureOutput):
    DESCRIPTION = "Shows pictures without keeping them: they go to the temporary folder."

    def __init__(self) -> None:
        self._prefix = PREVIEW_PREFIX + "".join(random.choices(string.ascii_lowercase, k=5))

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE", {"tooltip": "The pictures to show."})}, "hidden": _HIDDEN}

    def save_images(
        self,
        images: torch.Tensor,
        prompt: dict[str, Any] | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        chunks = picture_metadata(prompt, extra_pnginfo)
        return self._save(images, runtime.temp_directory(), self._prefix, "temp", chunks, compress_level=1)


CORE_NODES = {
    "LoadImage": LoadImage,
    "LoadImageMask": LoadImageMask,
    "SaveImage": SaveImage,
    "PreviewImage": PreviewImage,
}
CORE_TITLES = {
    "LoadImage": "Load Image",
    "LoadImageMask": "Load Image (as Mask)",
    "SaveImage": "Save Image",
    "PreviewImage": "Preview Image",
}
