"""Pictures as prompts: their CLIP embeddings, with weights, in a conditioning that Stage C reads beside the text.

Stage C maps every embedding to four tokens of its own, behind those of the text, and normalises them. Without a
picture it reads the tokens of a single embedding of zeros, as it was trained. A weight says how far the tokens go from
those to the picture's own, in a straight line. A picture at weight 0 is left out altogether, since further tokens of
nothing would not be the same as none.

On a `CONDITIONING` wire, pictures are entries of `unclip_conditioning`, as ComfyUI's unCLIPConditioning writes them:
either side reads the other's. ComfyUI multiplies the embedding by the strength of an entry instead, which the norm
behind it takes back: a half acts nearly as 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoisers import Pictures
from .handles import StageHandle
from .vision import encode_pictures
from .wires import PICTURE_WEIGHT

WIRE_KEY = "unclip_conditioning"


@dataclass(frozen=True, eq=False)
class ClipVisionOutput:
    """The value of a `CLIP_VISION_OUTPUT` wire, as far as Stable Cascade reads it.

    image_embeds: projected embeddings, not normalised, float32 ``[k, E]`` of k pictures.
    """

    image_embeds: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """ComfyUI's own answers to both ways of asking."""
        return getattr(self, name)


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Pictures with one weight, for Python without a graph.

    images: ``[k, 3, H, W]``, 0..1; all k are read for every picture that is made. weight: 0 leaves them out, 1 is what
    Stage C was trained with, 0.5 is halfway. crop: see `vision.clip_pixels`.
    """

    images: Tensor
    weight: float = 1.0
    crop: str = "center"

    @classmethod
    def read(cls, path: str | os.PathLike[str], weight: float = 1.0, crop: str = "center") -> ImagePrompt:
        """The picture in a file, without transparency and turned the way its camera was held."""
        from PIL import Image, ImageOps

        with Image.open(path) as file:
            pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGB"), np.float32) / 255
        return cls(torch.from_numpy(pixels).permute(2, 0, 1)[None], weight, crop)


def embed_prompts(encoder: StageHandle, prompts: Sequence[ImagePrompt]) -> Pictures | None:
    """All prompts' pictures with their weights, embeddings ``[1, k, E]``, for `stages.sample_stage_c(pictures=...)`.

    None where there are none, or none with a weight.
    """
    return Pictures.joined(
        [
            (encode_pictures(encoder, prompt.images, prompt.crop).cpu().transpose(0, 1), prompt.weight)
            for prompt in prompts
            if prompt.weight
        ]
    )


def add_pictures(conditioning: Sequence[Any], output: Any, weight: float) -> list:
    """A `CONDITIONING` with further pictures behind those that it has; a weight of 0 adds none.

    output: a `ClipVisionOutput`, or what ComfyUI's CLIPVisionEncode gives; `image_embeds` ``[k, E]`` of it is read.
    weight: see `ImagePrompt`; ComfyUI's samplers multiply the embeddings by it. What came in is not changed; prompts
    that were combined all get the pictures.

    Raises ValueError for a CLIP vision model without a projection, and where the conditioning has pictures already
    that were encoded with another width.
    """
    width = _width(output)
    if not weight:
        return list(conditioning)
    entry = {"clip_vision_output": output, "strength": weight, "noise_augmentation": 0.0, PICTURE_WEIGHT: weight}
    added = []
    for hidden, options in conditioning:
        before = options.get(WIRE_KEY) or []
        for found in _widths(before):
            if found != width:
                raise ValueError(
                    f"The picture was encoded {width} wide and the conditioning has one that is {found} wide, expected "
                    "one width: encode all pictures with the image encoder that belongs to the Stage C (ViT-L/14, 768 "
                    "wide, for the published ones)."
                )
        added.append([hidden, {**options, WIRE_KEY: [*before, entry]}])
    return added


def _width(output: Any) -> int:
    embeds = getattr(output, "image_embeds", None)
    if not isinstance(embeds, Tensor) or embeds.ndim != 2:
        found = "none" if embeds is None else f"one of shape {list(getattr(embeds, 'shape', ()))}"
        raise ValueError(
            f"The CLIP vision output has {found} where a projected embedding (image_embeds [pictures, width]) is "
            "expected: load CLIP ViT-L/14 with its projection in the CLIP vision loader."
        )
    return embeds.shape[-1]


def _widths(entries: Iterable[Mapping[str, Any]]) -> Iterable[int]:
    """Of the pictures of a conditioning; one without a projection is the sampler's to refuse."""
    for entry in entries:
        embeds = getattr(entry.get("clip_vision_output"), "image_embeds", None)
        if isinstance(embeds, Tensor):
            yield embeds.shape[-1]
