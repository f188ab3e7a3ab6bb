"""Noise that belongs to an image and not to its batch or device.

Each image has its own CPU generator, seeded ``seed + index``. All its noise (the initial noise, a mask's, every
step's) comes from that generator in the order of use, so an image made in a batch equals the one made alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SEED_SPACE = 2**64


def image_generators(seed: int, batch: int) -> list[torch.Generator]:
    """One CPU generator per image of a batch; image `i` is seeded ``seed + i`` (modulo 2**64)."""
    return [torch.Generator("cpu").manual_seed((seed + index) % _SEED_SPACE) for index in range(batch)]


def draw_noise(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Unit normal noise, float32 of `shape` ``[B, ...]``, image by image from its own generator.

    For a CUDA device it is drawn into pinned memory, which the GPU reads by itself: the host neither waits for the copy
    nor for the work before it, so that noise is drawn while the device computes.

    Raises ValueError when there is not one generator per image.
    """
    if len(generators) != shape[0]:
        raise ValueError(
            f"There are {len(generators)} noise generators for a batch of {shape[0]}: make one per image with "
            "image_generators(seed, batch)."
        )
    pinned = torch.device(device).type == "cuda"
    noise = torch.empty(tuple(shape), pin_memory=pinned)
    for image, generator in zip(noise, generators, strict=True):
        torch.randn(image.shape, generator=generator, out=image)
    return noise.to(device, non_blocking=pinned)
