"""The sampling loop: from a noisy latent to a clean one.

It knows nothing of stages, text or devices: a denoiser predicts, a sampler steps, guidance combines. The latent and
everything computed from it are float32; a denoiser casts for its model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .guidance import Guidance
from .masking import HeldLatent, fit_mask
from .noise import draw_noise
from .samplers import SAMPLERS, Previous, Step
from .schedules import add_noise, log_snr_at, noise_cond, signal_and_noise, step_times
from .targets import TARGETS

Predict = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]


class Denoiser(Protocol):
    """A model with its conditions, ready to be prepared for a run."""

    def prepare(self, noise_cond: Tensor, shape: Sequence[int], guided: bool) -> Predict:
        """Do once what does not depend on the latent.

        noise_cond: float32 ``[S]``, the model's time input at every step. shape: the latent's ``[B, C, H, W]``.
        guided: whether any step needs the unconditional prediction.
        Returns ``predict(x, index, guided)``: conditional and, when guided, unconditional prediction of ``x [B, ...]``
        at step `index`.
        """
        ...


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each step.

    step: 0-based number of the step just made, of `steps`. t, log_snr: the level it started from.
    denoised: the clean latent predicted in it. latent: the latent after it. Both float32 ``[B, C, H, W]``, not to be
    changed in place.
    """

    step: int
    steps: int
    t: float
    log_snr: float
    denoised: Tensor
    latent: Tensor


class Sampled(NamedTuple):
    """The result of a run, both float32 ``[B, C, H, W]``.

    latent: the clean latent predicted in the last step, which is what the reference decodes.
    noisy: the latent at `t_end`, from which another run can go on.
    """

    latent: Tensor
    noisy: Tensor


def noised_start(
    latent: Tensor, noise: Tensor, t: float, shift: float = 1.0, matched: bool = True, schedule: str = "cosine"
) -> Tensor:
    """The start of image to image: a clean latent noised for a run with ``t_start = t``.

    matched: noise to the level that the shifted schedule has at `t`, so that the model is told the truth. False gives
    the reference notebook's start, noised without the shift: with a shift of 2 it holds less noise than the model is
    told, and the result keeps less of the picture's detail.
    """
    return add_noise(latent.float(), noise.float(), log_snr_at(t, schedule, shift if matched else 1.0))


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x: Tensor,
    *,
    steps: int,
    sampler: str = "ddpm",
    schedule: str = "cosine",
    shift: float = 1.0,
    t_start: float = 1.0,
    t_end: float = 0.0,
    guidance: Guidance | None = None,
    target: str = "epsilon",
    generators: Sequence[torch.Generator] | None = None,
    clean: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Sampled:
    """Run a sampler from `t_start` to `t_end`.

    x: latent at the level of `t_start`, ``[B, C, H, W]``: unit noise for 1, `noised_start` for image to image.
    steps: number of model calls. sampler, schedule, target: names in SAMPLERS, SCHEDULES, TARGETS.
    shift: see `log_snr_at`. guidance: None is off.
    generators: one per image (`image_generators`); needed by samplers that add noise and by a mask.
    clean, mask: sample only where the mask is above 0 and hold the rest at the clean latent, which comes back exactly;
        the mask may be of any size that `fit_mask` takes. Both or none.
    callback: called after every step; an exception it raises ends the run, which is how a run is cancelled.

    Raises ValueError for settings that do not fit, and when the result is not finite.
    """
    for name, known, kind in ((sampler, SAMPLERS, "sampler"), (target, TARGETS, "target")):
        if name not in known:
            raise ValueError(f"There is no {kind} '{name}': choose one of {', '.join(known)}.")
    if generators is not None and len(generators) != x.shape[0]:
        raise ValueError(
            f"There are {len(generators)} noise generators for a batch of {x.shape[0]}: make one per image with "
            "image_generators(seed, batch)."
        )
    guidance = guidance or Guidance()
    advance, reading = SAMPLERS[sampler], TARGETS[target]
    x = x.float()

    def draw() -> Tensor:
        if generators is None:
            raise ValueError(
                "This run draws noise and has no generators: pass generators=image_generators(seed, batch)."
            )
        return draw_noise(generators, x.shape, x.device)

    times = step_times(steps, t_start, t_end)
    levels = log_snr_at(times, schedule, shift)
    scales = [guidance.scale_at(t) for t in times[:-1].tolist()]
    held = _held(clean, mask, x, draw)
    predict = denoiser.prepare(
        noise_cond(levels[:-1]).to(x.device), tuple(x.shape), guided=any(scale != 1 for scale in scales)
    )

    previous: Previous | None = None
    x0 = x
    for index, scale in enumerate(scales):
        log_snr, next_log_snr = levels[index], levels[index + 1]
        a, b = signal_and_noise(log_snr)
        if held:
            x = held.at_level(x, log_snr)
        cond, uncond = predict(x, index, scale != 1)
        prediction = cond.float() if uncond is None else guidance.combine(cond.float(), uncond.float(), scale)
        x0, epsilon = reading.x0(x, prediction, a, b), reading.epsilon(x, prediction, a, b)
        if held:
            x0 = held.restored(x0)
            epsilon = (x - a * x0) / b
        x = advance(Step(x, x0, epsilon, log_snr, next_log_snr, previous), draw)
        previous = Previous(x0, log_snr)
        if callback is not None:
            callback(StepInfo(index, steps, times[index].item(), log_snr.item(), x0, x))
    if held:
        x = held.at_level(x, levels[-1])
    if not x0.isfinite().all():
        raise ValueError(
            "Sampling gave a latent with NaN or infinite values, expected finite ones: load the model in bfloat16 "
            "or float32 if it runs in float16, whose range some models leave even where the loader rescaled them, or "
            "lower the guidance scale."
        )
    return Sampled(x0, x)


def _held(clean: Tensor | None, mask: Tensor | None, x: Tensor, draw: Callable[[], Tensor]) -> HeldLatent | None:
    if clean is None and mask is None:
        return None
    if clean is None or mask is None:
        raise ValueError(
            "Sampling a part needs both a mask and a clean latent to hold outside of it, one is missing: pass both."
        )
    if clean.shape[1:] != x.shape[1:] or clean.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"The latent to hold has the shape {tuple(clean.shape)}, expected {tuple(x.shape)}: encode the picture at "
            "the size that is sampled."
        )
    mask = fit_mask(mask, x.shape)
    if mask.min() == 1:
        return None  # nothing is held: the same run as without a mask, to the last bit
    return HeldLatent(clean.to(x.device, torch.float32).expand_as(x), mask.to(x.device), draw())
