"""The chain, step by step: what the nodes and `pipeline.py` both call, so that both give the same picture.

    encode_text -> empty_latent -> sample_stage_c -> sample_stage_b -> decode_stage_a

Each function takes a loaded stage (`handles.StageHandle`) and changes nothing that it is given. It runs where the
stage's weights are and returns its result in main memory. 0 and ``auto`` stand for the model's own value, which comes
from the file's metadata or from the known release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .acceleration import acceleration_of, acting
from .attached import stepped_adapters, stepped_controls
from .denoisers import Pictures, StageBDenoiser, StageCDenoiser, TextCondition
from .diffusion import Denoiser, Guidance, StepInfo, draw_noise, noised_start, sample, step_times
from .families import families_clash
from .float16 import finite_picture
from .handles import StageHandle
from .prompt_chunks import FindEmbedding
from .reuse import reused_steps
from .sizes import known_cells, stage_b_size, stage_c_size
from .threads import threads_for
from .tiles import tile_count, tiled_decode
from .windows import WindowedStageB, Windows, windows_of
from .wires import Latent

if TYPE_CHECKING:
    from PIL import Image

Callback = Callable[[StepInfo], None]

# In place of a sampler's name: the one that the model's file names.
AUTO_SAMPLER = "auto"

# A live preview of Stage B decodes at most this many latent cells a side: a picture of 256 pixels.
PREVIEW_CELLS = 64


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. Times run from 1 (noise) to 0 (picture).

    steps: model calls. guidance, shift: 0 is the model's own; a guidance of 1 is off. sampler: a name of
    `diffusion.SAMPLERS`, or ``auto`` for the model's own, which is ddpm where its file says nothing. start, end: the
    part of the schedule to run; a start below 1 begins from the latent that is given. guidance_end: guidance at t = 0,
    with a straight line from `guidance` at t = 1; 0 keeps it constant.
    guidance_from, guidance_until: guidance acts between these times. rescale, rescale_over: see `Guidance`.
    start_noise: for a start below 1, noise to the level that the model is told (``matched``) or, as the release's
    notebook does, to that of the schedule without its shift (``reference``).
    window, window_overlap: Stage B alone: pixels a side of the windows that it predicts in and that these share, see
    `windows.windows_of`; 0 is the whole picture at once, and a quarter of the window.
    """

    steps: int = 20
    guidance: float = 0.0
    shift: float = 0.0
    sampler: str = AUTO_SAMPLER
    start: float = 1.0
    end: float = 0.0
    guidance_end: float = 0.0
    guidance_from: float = 1.0
    guidance_until: float = 0.0
    rescale: float = 0.7
    rescale_over: Literal["image", "batch"] = "image"
    start_noise: Literal["matched", "reference"] = "matched"
    window: int = 0
    window_overlap: int = 0

    def for_model(self, handle: StageHandle) -> SamplingSettings:
        """These settings with the model's own guidance, shift and sampler in place of 0 and ``auto``."""
        own = handle.info.defaults
        sampler = own.get("sampler", "ddpm") if self.sampler == AUTO_SAMPLER else self.sampler
        return replace(
            self, guidance=self.guidance or own["guidance"], shift=self.shift or own["shift"], sampler=sampler
        )

    def describe(self) -> str:
        """In words, for the node that used them."""
        guidance = f"{self.guidance:g}"
        if self.guidance_end:
            guidance += f" to {self.guidance_end:g}"
        elif self.guidance == 1:
            guidance += " (off)"
        return f"{self.steps} steps of {self.sampler}, guidance {guidance}, shift {self.shift:g}"

    def as_guidance(self) -> Guidance:
        """What `diffusion.sample` takes, for settings with the model's own guidance in them."""
        scale = (self.guidance, self.guidance_end) if self.guidance_end else self.guidance
        interval = (self.guidance_from, self.guidance_until)
        return Guidance(scale, interval, self.rescale, self.rescale_over)


@torch.no_grad()
def encode_text(handle: StageHandle, text: str, find_embedding: FindEmbedding | None = None) -> TextCondition:
    """Encode a prompt; see `text.TextEncoder.encode` for weights, length, embeddings and errors."""
    with threads_for(handle):
        hidden, pooled = handle.expect("text_encoder").module.encode(text, find_embedding)
    return TextCondition(hidden.cpu(), pooled.cpu())


def own_size(handle: StageHandle, width: int = 0, height: int = 0) -> tuple[int, int]:
    """Pixels ``(width, height)`` with the Stage C's own in place of 0: 1024 for the release."""
    own = handle.expect("stage_c").info.defaults
    return width or own["width"], height or own["height"]


def empty_latent(
    handle: StageHandle, width: int = 0, height: int = 0, batch_size: int = 1, compression: float = 0.0
) -> Latent:
    """The latent that a picture starts from: zeros ``[B, 16, h, w]`` for any width and height in pixels.

    compression: pixels per cell, 0 for the published 42.67; see `sizes.proposed_compression` for large pictures.
    """
    width, height = own_size(handle, width, height)
    if batch_size < 1:
        raise ValueError(f"The batch size is {batch_size}, expected at least 1: ask for 1 picture or more.")
    samples = torch.zeros(batch_size, latent_channels(handle), *stage_c_size(height, width, compression))
    return Latent(samples, width, height, family=handle.family, compression=compression)


def trained_cells(handle: StageHandle) -> tuple[int, int]:
    """Least and most cells on the longer side of the latents that a Stage C knows: 24 to 60 for the release."""
    own = handle.expect("stage_c").info.defaults
    return known_cells(own["height"], own["width"])


def latent_channels(handle: StageHandle) -> int:
    """Channels of the latent that a Stage B or C samples, a Stage A decodes or a previewer shows."""
    if handle.stage == "stage_a":
        return handle.module.c_latent
    if handle.stage == "previewer":
        return handle.module.blocks[0].in_channels
    return handle.module.embedding[1].in_channels // handle.module.patch_size**2


def sample_stage_c(
    handle: StageHandle,
    positive: TextCondition,
    negative: TextCondition | None,
    latent: Latent,
    *,
    seed: int,
    settings: SamplingSettings,
    pictures: Tensor | Pictures | None = None,
    negative_pictures: Tensor | Pictures | None = None,
    callback: Callback | None = None,
) -> Latent:
    """From text, and pictures if there are any, to the 16-channel latent.

    negative: needed unless guidance is 1. pictures, negative_pictures: CLIP image embeddings ``[1 or B, k, 768]`` that
    the result should resemble or stay away from, or `Pictures` with weights; None is one of zeros, as in training.
    latent: gives size and batch; its samples count where `settings.start` is below 1 or where it has a mask, which
    holds them outside of it. Image i of the batch has the seed ``seed + i``.
    ControlNets and IP-Adapters that the handle carries steer the run; see `attachments`.
    """
    model = handle.expect("stage_c").module
    if settings.window or settings.window_overlap:
        raise ValueError(
            f"A window of {settings.window} pixels was asked for {handle.title}, expected none: set it to 0, only "
            "Stage B is sampled in windows."
        )
    _check_channels(handle, latent)
    check_family(handle, latent)
    widths = model.clip_txt_mapper.in_features, model.clip_txt_pooled_mapper.in_features
    for name, text in (("prompt", positive), ("negative prompt", negative)):
        if text is not None:
            _check_width(handle, name, text.hidden, widths[0])
            _check_width(handle, f"pooled {name}", text.pooled, widths[1])
    width = model.clip_img_mapper.in_features
    images = [torch.zeros(1, 1, width) if given is None else given for given in (pictures, negative_pictures)]
    for name, image in zip(("picture", "negative picture"), images, strict=True):
        _check_width(handle, name, image.embeddings if isinstance(image, Pictures) else image, width)
    times = step_times(settings.steps, settings.start, settings.end)[:-1].tolist()
    controls = stepped_controls(handle, latent.samples, latent.stage_c_pixels(), times)
    adapters = stepped_adapters(handle, latent.samples, latent.stage_c_pixels(), times)
    fast = acceleration_of(handle)
    denoiser = StageCDenoiser(fast.model, positive, negative, *images, controls, adapters, fast.step)
    samples = _sample(handle, denoiser, latent, seed, settings, callback)
    return replace(latent, samples=samples, family=handle.family)


def sample_stage_b(
    handle: StageHandle,
    latent: Latent,
    positive: TextCondition,
    negative: TextCondition | None,
    *,
    seed: int,
    settings: SamplingSettings,
    start_latent: Latent | None = None,
    callback: Callback | None = None,
    before_window: Callable[[], None] | None = None,
) -> Latent:
    """From the Stage C latent to Stage A's 4-channel latent, at the pixel size that travels with it.

    positive, negative: only their pooled text is read; negative is needed unless guidance is 1.
    start_latent: a Stage B latent to begin from, for a start below 1 or with a mask. Image i of the batch has the seed
    ``seed + i``. before_window: called before every window of every step, where `settings` ask for windows.
    A handle with a `reuse` gives an approximation; see `reuse`.
    """
    model = handle.expect("stage_b").module
    _check_prior(handle, latent)
    check_family(handle, latent)
    for name, text in (("prompt", positive), ("negative prompt", negative)):
        if text is not None:
            _check_width(handle, f"pooled {name}", text.pooled, model.clip_mapper.in_features)
    height, width = latent.stage_c_pixels()
    target = Latent(
        torch.zeros(len(latent.samples), latent_channels(handle), *stage_b_size(height, width)),
        width,
        height,
        batch_index=latent.batch_index,
    )
    if start_latent is not None:
        target = _from_start(handle, target, start_latent, settings)
    elif settings.start < 1:
        raise ValueError(
            f"Stage B starts at {settings.start:g} without a latent to start from: connect a Stage B latent to "
            "start_latent, or set start to 1."
        )
    pooled = None if negative is None else negative.pooled
    windowed = stage_b_windows(handle, latent, settings).total > 1
    fast = acceleration_of(handle, windowed)
    model = fast.model
    if windowed:
        model = WindowedStageB(model, settings.window, settings.window_overlap, before_window)
    denoiser = StageBDenoiser(model, latent.samples, positive.pooled, pooled, reused_steps(handle, settings), fast.step)
    samples = _sample(handle, denoiser, target, seed, settings, callback)
    return replace(target, samples=samples, mask=None, family=handle.family)


def stage_b_windows(handle: StageHandle, latent: Latent, settings: SamplingSettings) -> Windows:
    """The windows in which Stage B samples for this Stage C latent: a single one where the whole picture fits."""
    return windows_of(handle.module, stage_b_size(*latent.stage_c_pixels()), settings.window, settings.window_overlap)


def decode_stage_a(
    handle: StageHandle, latent: Latent, callback: Callable[[int], None] | None = None, tile: int = 0
) -> Tensor:
    """Decode Stage B latents to pictures ``[B, H, W, 3]``, float32 0..1, of exactly the pixel size asked for.

    Image by image, and in tiles of `tile` pixels where that is not 0, which needs less memory and gives the same.
    callback: gets the number of tiles (without them: of pictures) that are done, of `tiles.tile_count` for each image.
    """
    model = acceleration_of(handle.expect("stage_a")).model
    _check_channels(handle, latent)
    check_family(handle, latent)
    height, width = latent.stage_b_pixels()
    pictures: list[Tensor] = []
    each = tile_count(latent.samples.shape[2:], tile)

    def report(done: int) -> None:
        if callback is not None:
            callback(len(pictures) * each + done)

    for samples in latent.samples.split(1):
        with threads_for(handle, samples.shape[2] * samples.shape[3]), acting(handle):
            picture = tiled_decode(model, samples, tile, report, handle.device)
        pictures.append(_as_pictures(finite_picture(picture[..., :height, :width])))
    return torch.cat(pictures)


@torch.no_grad()
def preview_latent(handle: StageHandle, latent: Latent) -> Tensor:
    """Decode Stage C latents with the previewer to small pictures ``[B, 8 h, 8 w, 3]``, float32 0..1."""
    handle.expect("previewer")
    _check_channels(handle, latent)
    check_family(handle, latent)
    return _as_pictures(handle.module(latent.samples.to(handle.device, handle.dtype)))


@torch.no_grad()
def preview_stage_b(handle: StageHandle, samples: Tensor) -> Tensor:
    """A small picture of Stage B latents ``[B, 4, h, w]``: shrunk to 64 cells a side at most, then decoded."""
    longest = max(samples.shape[-2:])
    if longest > PREVIEW_CELLS:
        size = [max(1, round(side * PREVIEW_CELLS / longest)) for side in samples.shape[-2:]]
        samples = torch.nn.functional.interpolate(samples, size=size, mode="area")
    return _as_pictures(handle.expect("stage_a").module.decode(samples.to(handle.device)))


def to_picture(image: Tensor) -> Image.Image:
    """A picture ``[H, W, 3]``, 0..1, as an 8-bit PIL image, rounded to the nearest."""
    from PIL import Image

    return Image.fromarray(image.float().clamp(0, 1).mul(255).round().byte().cpu().numpy())


def check_family(handle: StageHandle, latent: Latent) -> None:
    """ValueError where the latent was made by the other family's weights."""
    if families_clash(handle.family, latent.family):
        ours, theirs = ("bundled tiny", "published") if handle.family == "tiny" else ("published", "bundled tiny")
        raise ValueError(
            f"{handle.title} belongs to the {ours} family and the latent was made by the {theirs} one, expected one "
            "family for the whole chain: choose files of one family in all loaders (auto takes the tiny file where "
            "the published one is missing)."
        )


def _sample(
    handle: StageHandle,
    denoiser: Denoiser,
    latent: Latent,
    seed: int,
    settings: SamplingSettings,
    callback: Callback | None,
) -> Tensor:
    settings = settings.for_model(handle)
    generators = latent.generators(seed)
    start = latent.samples.to(handle.device)
    x = draw_noise(generators, start.shape, handle.device)
    matched = _start_is_matched(settings)
    if settings.start < 1:
        x = noised_start(start, x, settings.start, settings.shift, matched)
    rows, columns = handle.module.token_size(*start.shape[2:])
    positions = len(start) * rows * columns * (1 if settings.guidance == 1 else 2)
    with threads_for(handle, positions), acting(handle):
        result = sample(
            denoiser,
            x,
            steps=settings.steps,
            sampler=settings.sampler,
            shift=settings.shift,
            t_start=settings.start,
            t_end=settings.end,
            guidance=settings.as_guidance(),
            generators=generators,
            clean=None if latent.mask is None else start,
            mask=latent.mask,
            callback=callback,
        )
    return result.latent.cpu()


def _start_is_matched(settings: SamplingSettings) -> bool:
    """Whether the noise of a start below 1 fits the shift; ValueError for an unknown name or one without effect."""
    if settings.start_noise not in ("matched", "reference"):
        raise ValueError(f"There is no start_noise '{settings.start_noise}': choose matched or reference.")
    if settings.start_noise == "reference" and settings.start == 1:
        raise ValueError(
            "start_noise is 'reference' and has no effect when start is 1, where a run begins from noise alone: lower "
            "start, or set start_noise to 'matched'."
        )
    return settings.start_noise == "matched"


def _from_start(handle: StageHandle, target: Latent, start: Latent, settings: SamplingSettings) -> Latent:
    """`target` with the samples and the mask of the Stage B latent to start from."""
    _check_channels(handle, start)
    check_family(handle, start)
    if start.samples.shape[-2:] != target.samples.shape[-2:] or len(start.samples) not in (1, len(target.samples)):
        found, wanted = ([len(s), *s.shape[-2:]] for s in (start.samples, target.samples))
        raise ValueError(
            f"start_latent has batch, height and width {found} and Stage B samples {wanted} for this Stage C latent: "
            "give a latent of the same picture size."
        )
    if settings.start == 1 and start.mask is None:
        raise ValueError(
            "start_latent has no effect when start is 1 and it has no mask: lower start (0.5 keeps about half), or "
            "disconnect it."
        )
    return replace(target, samples=start.samples.expand_as(target.samples), mask=start.mask)


def _check_channels(handle: StageHandle, latent: Latent) -> None:
    channels = latent_channels(handle)
    if latent.samples.shape[1] != channels:
        raise ValueError(
            f"The latent has {latent.samples.shape[1]} channels, {handle.title} expects {channels}: Stage C latents "
            "have 16, Stage B latents have 4."
        )


def _check_prior(handle: StageHandle, latent: Latent) -> None:
    channels = handle.module.effnet_mapper[0].in_channels
    if latent.samples.shape[1] != channels:
        raise ValueError(
            f"The latent has {latent.samples.shape[1]} channels, {handle.title} reads a Stage C latent of {channels}: "
            "connect the output of Stage C."
        )


def _check_width(handle: StageHandle, name: str, embedding: Tensor, width: int) -> None:
    if embedding.shape[-1] != width:
        raise ValueError(
            f"The {name} was encoded {embedding.shape[-1]} wide and {handle.title} reads {width}: encode it with the "
            "CLIP model that belongs to it (for the published ones ViT-bigG/14, 1280 wide, reads text and ViT-L/14, "
            "768 wide, pictures; the tiny ones have their own)."
        )


def _as_pictures(pictures: Tensor) -> Tensor:
    """``[B, 3, H, W]`` of any range to ``[B, H, W, 3]``, float32 0..1, in main memory."""
    return pictures.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().contiguous()
