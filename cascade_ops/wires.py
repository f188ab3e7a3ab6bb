"""The values that travel between nodes, read into types of this library and written back.

ComfyUI's `LATENT` is `{"samples": [B, C, h, w], ...}` and its `CONDITIONING` is `[[hidden, {"pooled_output": ...}]]`.
Values on a wire are those of ComfyUI's own nodes, so that either side reads the other's: a Stage C latent as the model
gives it, a Stage B latent times Stage A's published scale (see `WIRE_SCALE`).

A latent made here also says for which picture it is (`width`, `height` in pixels), how many of its pixels make a cell
of Stage C where that is not the published number (`cascade_compression`), and which family of weights made it
(`cascade_family`). Other nodes may drop these keys or leave them behind on a latent that they resized: they are used
only where they still fit the samples.

Pictures are the entries of a conditioning's `unclip_conditioning`, as ComfyUI's unCLIPConditioning writes them. One
written here also has `cascade_weight`, a weight that acts evenly (see `denoisers.Pictures`); ComfyUI's samplers read
its `strength`, which scales the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoints.releases import SCALE_FACTOR
from .denoisers import Pictures, TextCondition
from .diffusion import image_generators
from .sizes import STAGE_A_COMPRESSION, picture_size, stage_b_size, stage_c_size

# What a latent is multiplied by to be put on a wire.
WIRE_SCALE = {"stage_c": 1.0, "stage_b": SCALE_FACTOR}

# What each sampler reads of a conditioning, or may leave unread without loss.
# Stage B: one conditioning serves both samplers, and pictures act on Stage C alone, which hands their content on in its
# latent; ComfyUI's Stage B leaves them unread too.
_READ = {
    "stage_c": ("pooled_output", "unclip_conditioning"),
    "stage_b": ("pooled_output", "unclip_conditioning", "stable_cascade_prior"),
}
# The weight of a picture in an entry that was written here.
PICTURE_WEIGHT = "cascade_weight"
# Words for the most frequent of all the others.
_REFUSED = {
    "area": "an area",
    "mask": "a mask",
    "strength": "a strength",
    "start_percent": "a range of steps",
    "end_percent": "a range of steps",
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
    "concat_latent_image": "a picture for inpainting models",
    "reference_latents": "reference pictures",
    "stable_cascade_prior": "a Stage C latent for Stage B",
}


@dataclass(frozen=True)
class Latent:
    """Latents of a batch of pictures.

    samples: float32 ``[B, C, h, w]``, as the models give and take them.
    width, height: pixels of the picture that was asked for, None if not known.
    mask: ``[n, 1, H, W]`` of any size, 1 where to sample. batch_index: which image of its seed's batch each one is;
    None counts from 0. family: ``tiny``, ``release`` or an empty string for weights that are neither.
    compression: pixels of the picture per cell of the Stage C latent, 0 for the published 42.67.
    """

    samples: Tensor
    width: int | None = None
    height: int | None = None
    mask: Tensor | None = None
    batch_index: tuple[int, ...] | None = None
    family: str = ""
    compression: float = 0.0

    def stage_c_pixels(self) -> tuple[int, int]:
        """Pixels ``(height, width)`` to make of this Stage C latent."""
        size = tuple(self.samples.shape[-2:])
        if self.width and self.height and stage_c_size(self.height, self.width, self.compression) == size:
            return self.height, self.width
        return picture_size(*size)

    def stage_b_pixels(self) -> tuple[int, int]:
        """Pixels ``(height, width)`` to keep of this Stage B latent, which may decode to a few more."""
        size = tuple(self.samples.shape[-2:])
        if self.width and self.height and stage_b_size(self.height, self.width) == size:
            return self.height, self.width
        return size[0] * STAGE_A_COMPRESSION, size[1] * STAGE_A_COMPRESSION

    def numbers(self) -> tuple[int, ...]:
        """Which image of its seed's batch each one is; ValueError where `batch_index` has another number of them."""
        batch = len(self.samples)
        if self.batch_index is None:
            return tuple(range(batch))
        if len(self.batch_index) != batch:
            raise ValueError(
                f"The latent holds {batch} pictures and its batch_index {len(self.batch_index)} numbers, expected as "
                "many: take the images out of the batch with one node."
            )
        return self.batch_index

    def generators(self, seed: int) -> list[torch.Generator]:
        """One noise generator per image, seeded `seed` plus its number."""
        return [image_generators(seed + number, 1)[0] for number in self.numbers()]

    def to_wire(self, stage: str = "stage_c") -> dict[str, Any]:
        """The value for a `LATENT` output; `stage` says whose latent it is, ``stage_c`` or ``stage_b``."""
        wire: dict[str, Any] = {"samples": self.samples * WIRE_SCALE[stage]}
        optional = {
            "width": self.width,
            "height": self.height,
            "noise_mask": self.mask,
            "batch_index": None if self.batch_index is None else list(self.batch_index),
            "cascade_family": self.family or None,
            "cascade_compression": self.compression or None,
        }
        return wire | {key: value for key, value in optional.items() if value is not None}


def read_latent(wire: Mapping[str, Any], stage: str = "stage_c") -> Latent:
    """Read a `LATENT` of `stage` (``stage_c`` or ``stage_b``); ValueError for a value of another kind."""
    samples = wire.get("samples") if isinstance(wire, Mapping) else None
    if not isinstance(samples, Tensor) or samples.ndim != 4:
        found = f"samples of shape {list(samples.shape)}" if isinstance(samples, Tensor) else type(wire).__name__
        raise ValueError(
            f"The latent input holds {found}, expected samples [batch, channels, height, width]: connect the latent of "
            "a Stable Cascade node."
        )
    index = wire.get("batch_index")
    return Latent(
        samples.float() / WIRE_SCALE[stage],
        wire.get("width"),
        wire.get("height"),
        wire.get("noise_mask"),
        None if index is None else tuple(int(number) for number in index),
        wire.get("cascade_family", ""),
        wire.get("cascade_compression", 0.0),
    )


def read_condition(wire: Any, name: str, stage: str = "stage_c") -> TextCondition:
    """Read the text of a `CONDITIONING` for the sampler of `stage`; `name` is the input's, for messages.

    Raises ValueError for several entries, a missing pooled text, and additions that would have no effect here.
    """
    hidden, options = _only_entry(wire, name)
    unread = [key for key, value in options.items() if value is not None and key not in _READ[stage]]
    if unread:
        words = ", ".join(f"{_REFUSED[key]} ('{key}')" if key in _REFUSED else f"'{key}'" for key in unread)
        raise ValueError(
            f"The conditioning of '{name}' carries {words}, which has no effect on Stable Cascade here: remove the "
            "nodes that add it."
        )
    pooled = options.get("pooled_output")
    if pooled is None:
        raise ValueError(
            f"The conditioning of '{name}' has no pooled text ('pooled_output'), which Stable Cascade reads: use "
            "'Cascade: encode text', or a CLIP loader of the type stable_cascade."
        )
    return TextCondition(hidden, pooled)


def read_pictures(wire: Any, name: str) -> Pictures | None:
    """Read the pictures of a `CONDITIONING`, one after the other: embeddings ``[1, k, 768]`` with their weights.

    Those of ComfyUI's unCLIPConditioning are scaled by its strength, as ComfyUI does it, and have the weight 1. What
    has a weight or a strength of 0 is left out; None where nothing is left.

    Raises ValueError for noise on the embeddings, which Stable Cascade was not made for, for a CLIP vision model
    without a projection, and for pictures that were encoded with different widths.
    """
    parts = []
    for entry in _only_entry(wire, name)[1].get("unclip_conditioning") or ():
        if entry.get("noise_augmentation"):
            raise ValueError(
                f"A picture in the conditioning of '{name}' has a noise_augmentation of "
                f"{entry['noise_augmentation']:g}, which Stable Cascade cannot follow: set it to 0 in "
                "unCLIPConditioning."
            )
        embedding = getattr(entry["clip_vision_output"], "image_embeds", None)
        if embedding is None:
            raise ValueError(
                f"A picture in the conditioning of '{name}' has no projected embedding (image_embeds), expected one of "
                "CLIP ViT-L/14: load that model in the CLIP vision loader."
            )
        embedding = embedding.float().reshape(1, -1, embedding.shape[-1])
        if PICTURE_WEIGHT in entry:
            parts.append((embedding, entry[PICTURE_WEIGHT]))
        else:
            parts.append((embedding * entry["strength"], float(bool(entry["strength"]))))
    parts = [(embedding, weight) for embedding, weight in parts if weight]
    widths = sorted({embedding.shape[-1] for embedding, _ in parts})
    if len(widths) > 1:
        raise ValueError(
            f"The pictures in the conditioning of '{name}' were encoded {' and '.join(map(str, widths))} wide, "
            "expected one width: encode all with the image encoder that belongs to the Stage C (ViT-L/14, 768 wide, "
            "for the published ones)."
        )
    return Pictures.joined(parts)


def check_prior(wire: Any, name: str, latent: Latent) -> None:
    """ValueError where a `CONDITIONING` brings another Stage C latent than `latent`, which is the one that counts."""
    prior = _only_entry(wire, name)[1].get("stable_cascade_prior")
    if prior is not None and not torch.equal(prior.to(latent.samples), latent.samples):
        raise ValueError(
            f"The conditioning of '{name}' brings a Stage C latent of its own (StableCascade_StageB_Conditioning), "
            "which is another than the one at 'latent': connect that one to 'latent' and leave the node out."
        )


def _only_entry(wire: Any, name: str) -> tuple[Tensor, Mapping[str, Any]]:
    if not isinstance(wire, (list, tuple)) or not wire:
        raise ValueError(f"The input '{name}' holds no conditioning: connect 'Cascade: encode text'.")
    if len(wire) > 1:
        raise ValueError(
            f"The input '{name}' combines {len(wire)} prompts, and Stable Cascade's samplers take one: write them as "
            "one prompt, or connect only one of them."
        )
    hidden, options = wire[0]
    return hidden, options


def write_condition(hidden: Tensor, pooled: Tensor) -> list:
    """The value for a `CONDITIONING` output."""
    return [[hidden, {"pooled_output": pooled}]]
