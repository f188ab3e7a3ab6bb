"""The values that travel between nodes, read into types of this library and written back.

ComfyUI's `LATENT` is `{"samples": [B, C, h, w], ...}` and its `CONDITIONING` is `[[hidden, {"pooled_output": ...}]]`.
A latent made here also says for which picture it is (`width`, `height` in pixels) and which family of weights made it
(`cascade_family`). Other nodes may drop these keys or leave them behind on a latent that they resized: they are used
only where they still fit the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoisers import TextCondition
from .diffusion import image_generators
from .sizes import STAGE_A_COMPRESSION, picture_size, stage_b_size, stage_c_size

# What core nodes add to a conditioning and the samplers here cannot follow.
_REFUSED_CONDITIONS = {
    "area": "an area",
    "mask": "a mask",
    "strength": "a strength",
    "start_percent": "a range of steps",
    "end_percent": "a range of steps",
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "unclip_conditioning": "a picture (unCLIP)",
    "hooks": "hooks",
}


@dataclass(frozen=True)
class Latent:
    """Latents of a batch of pictures.

    samples: float32 ``[B, C, h, w]``. width, height: pixels of the picture that was asked for, None if not known.
    mask: ``[n, 1, H, W]`` of any size, 1 where to sample. batch_index: which image of its seed's batch each one is;
    None counts from 0. family: ``tiny``, ``release`` or an empty string for weights that are neither.
    """

    samples: Tensor
    width: int | None = None
    height: int | None = None
    mask: Tensor | None = None
    batch_index: tuple[int, ...] | None = None
    family: str = ""

    def stage_c_pixels(self) -> tuple[int, int]:
        """Pixels ``(height, width)`` to make of this Stage C latent."""
        size = tuple(self.samples.shape[-2:])
        if self.width and self.height and stage_c_size(self.height, self.width) == size:
            return self.height, self.width
        return picture_size(*size)

    def stage_b_pixels(self) -> tuple[int, int]:
        """Pixels ``(height, width)`` to keep of this Stage B latent, which may decode to a few more."""
        size = tuple(self.samples.shape[-2:])
        if self.width and self.height and stage_b_size(self.height, self.width) == size:
            return self.height, self.width
        return size[0] * STAGE_A_COMPRESSION, size[1] * STAGE_A_COMPRESSION

    def generators(self, seed: int) -> list[torch.Generator]:
        """One noise generator per image, seeded `seed` plus its index."""
        batch = len(self.samples)
        if self.batch_index is None:
            return image_generators(seed, batch)
        if len(self.batch_index) != batch:
            raise ValueError(
                f"The latent holds {batch} images and its batch_index {len(self.batch_index)} numbers, expected as "
                "many: take the images out of the batch with one node."
            )
        return [image_generators(seed + index, 1)[0] for index in self.batch_index]

    def to_wire(self) -> dict[str, Any]:
        """The value for a `LATENT` output."""
        wire: dict[str, Any] = {"samples": self.samples}
        optional = {
            "width": self.width,
            "height": self.height,
            "noise_mask": self.mask,
            "batch_index": None if self.batch_index is None else list(self.batch_index),
            "cascade_family": self.family or None,
        }
        return wire | {key: value for key, value in optional.items() if value is not None}


def read_latent(wire: Mapping[str, Any]) -> Latent:
    """Read a `LATENT`; ValueError for a value of another kind."""
    samples = wire.get("samples") if isinstance(wire, Mapping) else None
    if not isinstance(samples, Tensor) or samples.ndim != 4:
        found = f"samples of shape {list(samples.shape)}" if isinstance(samples, Tensor) else type(wire).__name__
        raise ValueError(
            f"The latent input holds {found}, expected samples [batch, channels, height, width]: connect the latent of "
            "a Stable Cascade node."
        )
    index = wire.get("batch_index")
    return Latent(
        samples.float(),
        wire.get("width"),
        wire.get("height"),
        wire.get("noise_mask"),
        None if index is None else tuple(int(number) for number in index),
        wire.get("cascade_family", ""),
    )


def read_condition(wire: Any, name: str) -> TextCondition:
    """Read a `CONDITIONING`; `name` is the input's, for messages.

    Raises ValueError for several entries, a missing pooled text, and additions that would have no effect here.
    """
    if not isinstance(wire, (list, tuple)) or not wire:
        raise ValueError(f"The input '{name}' holds no conditioning: connect 'Cascade: encode text'.")
    if len(wire) > 1:
        raise ValueError(
            f"The input '{name}' combines {len(wire)} prompts, and Stable Cascade's samplers take one: write them as "
            "one prompt, or connect only one of them."
        )
    hidden, options = wire[0]
    for key, words in _REFUSED_CONDITIONS.items():
        if options.get(key) is not None:
            raise ValueError(
                f"The conditioning of '{name}' carries {words} ('{key}'), which has no effect on Stable Cascade here: "
                "remove the node that adds it."
            )
    pooled = options.get("pooled_output")
    if pooled is None:
        raise ValueError(
            f"The conditioning of '{name}' has no pooled text ('pooled_output'), which Stable Cascade reads: use "
            "'Cascade: encode text', or a CLIP loader of the type stable_cascade."
        )
    return TextCondition(hidden, pooled)


def write_condition(hidden: Tensor, pooled: Tensor) -> list:
    """The value for a `CONDITIONING` output."""
    return [[hidden, {"pooled_output": pooled}]]
