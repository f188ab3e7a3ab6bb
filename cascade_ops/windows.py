"""Stage B in windows: a picture that does not fit, predicted part by part and blended at every step.

Source: Bar-Tal et al., "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation" (2023). All windows
share one latent, and where they overlap the step follows the weighted mean of their predictions, so that neighbours
agree before either is finished. Here each window also reads its own part of the Stage C latent, which says what is
where; so unlike in text to image by windows nothing is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .models import Prepared, StageB
from .reuse import InnerStep
from .sizes import STAGE_A_COMPRESSION


class Part(NamedTuple):
    """The tokens of a window along one axis, and their weights in the blend, which sum to 1 over all windows."""

    tokens: slice
    weights: Tensor


class Windows(NamedTuple):
    """The windows of a picture: every part of its height with every part of its width."""

    rows: tuple[Part, ...]
    columns: tuple[Part, ...]

    @property
    def total(self) -> int:
        return len(self.rows) * len(self.columns)

    def on(self, device: torch.device) -> Windows:
        """The same with the weights on a device, where each step reads them."""
        axes = (tuple(part._replace(weights=part.weights.to(device)) for part in axis) for axis in self)
        return Windows(*axes)

    @property
    def largest(self) -> tuple[int, int]:
        """Rows and columns of tokens of the largest window."""
        rows, columns = (max(len(part.weights) for part in axis) for axis in self)
        return rows, columns


def windows_of(model: StageB, size: Sequence[int], window: int, overlap: int = 0) -> Windows:
    """The windows of a Stage B latent of `size` ``(height, width)``; a single one where the whole picture fits.

    window: most pixels a side; 0 is the whole picture. overlap: least pixels that neighbours share; 0 is a quarter of
    the window. Windows begin at whole tokens of the network's lowest level, every 64 pixels in the release, so that
    their levels lie as the whole picture's do. To such steps the window is rounded down and the overlap up.

    Raises ValueError for a window that is too small, and for an overlap of more than half of it or without a window.
    """
    lengths = model.token_size(*size)
    if not window:
        if overlap:
            raise ValueError(
                f"The windows overlap by {overlap} pixels and there are none: set window, or set window_overlap to 0."
            )
        return Windows(*((_whole(length),) for length in lengths))
    block = 2 ** (len(model.c_hidden) - 1)
    pixels = block * model.patch_size * STAGE_A_COMPRESSION
    blocks, shared = window // pixels, math.ceil((overlap or window // 4) / pixels)
    if blocks < 2:
        raise ValueError(
            f"A window of {window} pixels was asked for, expected 0 (the whole picture at once) or at least "
            f"{2 * pixels}: 1024 suits the release."
        )
    if overlap < 0 or 2 * shared > blocks:
        raise ValueError(
            f"Windows of {blocks * pixels} pixels are to overlap by {overlap}, expected {pixels} to "
            f"{blocks // 2 * pixels}, half of a window: lower window_overlap, or set it to 0 for a quarter."
        )
    return Windows(*(_parts(length, blocks, shared, block) for length in lengths))


def _whole(length: int) -> Part:
    return Part(slice(0, length), torch.ones(length))


def _parts(length: int, window: int, shared: int, block: int) -> tuple[Part, ...]:
    """Cover `length` tokens evenly with windows of `window` blocks that share at least `shared` blocks."""
    blocks = math.ceil(length / block)
    if blocks <= window:
        return (_whole(length),)
    count = math.ceil((blocks - shared) / (window - shared))
    starts = [i * (blocks - window) // (count - 1) * block for i in range(count)]
    stops = [min(length, start + window * block) for start in starts]
    weights = torch.zeros(count, length)
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        weights[i, start:stop] = 1
        if i > 0:
            weights[i, start : stops[i - 1]] *= _rise(stops[i - 1] - start)
        if i < count - 1:
            weights[i, starts[i + 1] : stop] *= 1 - _rise(stop - starts[i + 1])
    weights = weights / weights.sum(0)
    tokens = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
    return tuple(Part(part, row[part]) for part, row in zip(tokens, weights, strict=True))


def _rise(length: int) -> Tensor:
    """Half a cosine wave from above 0 to below 1."""
    return 0.5 - 0.5 * torch.cos((torch.arange(length) + 0.5) * (math.pi / length))


@dataclass(frozen=True)
class PreparedWindows:
    """What a run needs beside the latent.

    prepared: for ``N`` conditions, without the picture conditions. grid: their Stage C latents ``[N, 16, rows,
    columns]`` on the tokens of the whole picture.
    """

    prepared: Prepared
    grid: Tensor
    windows: Windows

    def narrow(self, start: int, length: int) -> PreparedWindows:
        """The part for ``length`` conditions from ``start`` on, as views."""
        return replace(self, prepared=self.prepared.narrow(start, length), grid=self.grid.narrow(0, start, length))


@dataclass(frozen=True)
class WindowedStageB:
    """A Stage B that predicts in windows, in place of `StageB` in a `StageBDenoiser`.

    window, overlap: see `windows_of`. before_each: called before every window; an exception it raises ends the run.
    """

    model: StageB
    window: int
    overlap: int = 0
    before_each: Callable[[], None] | None = None

    def prepare(self, timesteps: Tensor, effnet: Tensor, clip: Tensor, size: tuple[int, int]) -> PreparedWindows:
        """See `StageB.prepare`.

        The Stage C latents are resized to the tokens of the whole picture, as without windows, and cut afterwards. The
        wide tensors that are made of them belong to a window and a step, which keeps them small.
        """
        prepared = self.model.prepare_text(timesteps, clip)
        grid = self.model.on_tokens(effnet, self.model.token_size(*size))
        windows = windows_of(self.model, size, self.window, self.overlap).on(grid.device)
        return PreparedWindows(prepared, grid, windows)

    def step(self, x: Tensor, prepared: PreparedWindows, index: int, inner: InnerStep | None = None) -> Tensor:
        """Predict for latents ``x [N, 4, H, W]`` at a prepared noise level; ``[N, 4, H, W]`` float32.

        inner: where the inner levels of windows are reused; each window has its own.
        """
        patch = self.model.patch_size
        blended = torch.zeros_like(x, dtype=torch.float32)
        for number, (down, across) in enumerate(product(prepared.windows.rows, prepared.windows.columns)):
            if self.before_each is not None:
                self.before_each()
            added = self.model.token_condition(prepared.grid[..., down.tokens, across.tokens])
            cut = (..., _scaled(down.tokens, patch), _scaled(across.tokens, patch))
            own = None if inner is None else inner.of(number)
            prediction = self.model.step(x[cut], replace(prepared.prepared, added=added), index, inner=own).float()
            weight = down.weights[:, None] * across.weights
            blended[cut] += prediction * weight.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        return blended


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)
