"""The last pictures of a run, on which statistics of the finished weights are fitted."""

from __future__ import annotations

import torch
from torch import Tensor


class KeptPictures:
    """The last `count` pictures that were given, as bytes, cut from their centre to one square size.

    The side is the shortest that was seen, so that pictures of different buckets go into one tensor.
    """

    def __init__(self, count: int):
        self.count = count
        self._pictures: Tensor | None = None

    def add(self, images: Tensor) -> None:
        """Keep ``images [B, 3, H, W]``, 0..1."""
        new = (images.detach()[-self.count :].clamp(0, 1) * 255).round().byte().cpu()
        side = min(new.shape[-2:])
        if self._pictures is not None:
            side = min(side, self._pictures.shape[-1])
            new = torch.cat([_centre(self._pictures, side), _centre(new, side)])
        self._pictures = _centre(new, side)[-self.count :].clone()

    def images(self, multiple: int = 1) -> Tensor:
        """What is kept, ``[N, 3, S, S]`` float32, 0..1, with S cut to a multiple of `multiple`.

        Raises:
            ValueError: nothing was given yet.
        """
        if self._pictures is None:
            raise ValueError("No picture was seen yet, expected at least one batch: train for a step before exporting.")
        side = self._pictures.shape[-1] // multiple * multiple
        return _centre(self._pictures, side).float() / 255

    def state(self) -> dict[str, Tensor]:
        return {} if self._pictures is None else {"kept": self._pictures}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._pictures = state["kept"].cpu() if "kept" in state else None


def _centre(images: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]
