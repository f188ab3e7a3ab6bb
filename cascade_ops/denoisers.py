"""Stage C and Stage B with their conditions, as denoisers for `diffusion.sample`.

A denoiser prepares its model once per run for the conditional and, when guided, the unconditional half. A guided step
runs both halves as one batch; an unguided one runs the conditional half alone. Conditions are given for the whole
batch or once for all images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion.sampling import Predict
from .models import Prepared, StageB, StageC


class TextCondition(NamedTuple):
    """CLIP text embeddings of one prompt for all images (n = 1) or of one per image (n = B).

    hidden: ``[n, T, 1280]``, the last hidden state before the final norm. pooled: ``[n, 1280]`` or ``[n, 1, 1280]``.
    """

    hidden: Tensor
    pooled: Tensor


def _for_batch(name: str, condition: Tensor, batch: int, ndim: int, device: torch.device) -> Tensor:
    """A condition expanded to ``[batch, ...]`` with `ndim` dimensions, a missing token axis added."""
    if condition.ndim == 2 and ndim == 3:
        condition = condition[:, None]
    if condition.ndim != ndim or condition.shape[0] not in (1, batch):
        raise ValueError(
            f"The {name} has the shape {tuple(condition.shape)}, expected {ndim} dimensions and a batch of 1 or "
            f"{batch}: give one condition for all images or one per image."
        )
    return condition.to(device).expand(batch, *condition.shape[1:])


def _no_negative(stage: str) -> ValueError:
    return ValueError(
        f"Guidance other than 1 needs a negative condition and {stage} was given none: encode a negative prompt "
        "(it may be empty), or set guidance to 1."
    )


Forward = Callable[[Tensor, Prepared, int, int], Tensor]  # x, prepared, step index, how many halves x holds


def _one_half(forward: Forward, cond: Prepared) -> Predict:
    """Never guided."""

    def predict(x: Tensor, index: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        return forward(x, cond, index, 1), None

    return predict


def _joined_halves(forward: Forward, both: Prepared, batch: int) -> Predict:
    """Both halves in one pass when guided; `both` holds the conditional half first."""
    cond = both.narrow(0, batch)

    def predict(x: Tensor, index: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        if not guided:
            return forward(x, cond, index, 1), None
        cond_half, uncond_half = forward(torch.cat([x, x]), both, index, 2).chunk(2)
        return cond_half, uncond_half

    return predict


def _separate_halves(forward: Forward, cond: Prepared, uncond: Prepared) -> Predict:
    """One pass per half."""

    def predict(x: Tensor, index: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        return forward(x, cond, index, 1), forward(x, uncond, index, 1) if guided else None

    return predict


@dataclass(frozen=True)
class StageCDenoiser:
    """Stage C conditioned on text and, optionally, pictures.

    cond, uncond: text of the prompt and of the negative prompt; `uncond` is only needed for guidance. Their lengths
        may differ; each half then runs by itself, since padding would change what attention sees.
    image, uncond_image: CLIP image embeddings ``[n, k, 768]`` or ``[n, 768]``; None is one embedding of zeros in the
        conditional half, as in training, and as many zeros as `image` has in the unconditional one.
    control: residuals ``[n, c, h, w]`` or None, one per residual block, the same for both halves.
    """

    model: StageC
    cond: TextCondition
    uncond: TextCondition | None = None
    image: Tensor | None = None
    uncond_image: Tensor | None = None
    control: Sequence[Tensor | None] | None = None

    def prepare(self, noise_cond: Tensor, shape: Sequence[int], guided: bool) -> Predict:
        """See `diffusion.Denoiser`; ValueError when a condition does not fit the batch or a negative is missing."""
        batch = shape[0]
        controls = {halves: self._control(batch, halves, noise_cond.device) for halves in ((1, 2) if guided else (1,))}

        def forward(x: Tensor, prepared: Prepared, index: int, halves: int) -> Tensor:
            return self.model.step(x, prepared, index, control=controls[halves])

        image = self.image
        if image is None:
            image = self.cond.hidden.new_zeros(1, 1, self.model.clip_img_mapper.in_features)
        cond = self._embeddings("prompt", self.cond, image, batch, noise_cond.device)
        if not guided:
            return _one_half(forward, self.model.prepare(noise_cond, *cond))
        if self.uncond is None:
            raise _no_negative("Stage C")
        uncond_image = torch.zeros_like(image) if self.uncond_image is None else self.uncond_image
        uncond = self._embeddings("negative prompt", self.uncond, uncond_image, batch, noise_cond.device)
        if all(ours.shape == theirs.shape for ours, theirs in zip(cond, uncond, strict=True)):
            pairs = (torch.cat([ours, theirs.to(ours.dtype)]) for ours, theirs in zip(cond, uncond, strict=True))
            return _joined_halves(forward, self.model.prepare(noise_cond, *pairs), batch)
        halves = (self.model.prepare(noise_cond, *half) for half in (cond, uncond))
        return _separate_halves(forward, *halves)

    @staticmethod
    def _embeddings(
        name: str, text: TextCondition, image: Tensor, batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            _for_batch(name, text.hidden, batch, 3, device),
            _for_batch(f"pooled {name}", text.pooled, batch, 3, device),
            _for_batch("image embedding", image, batch, 3, device),
        )

    def _control(self, batch: int, halves: int, device: torch.device) -> list[Tensor | None] | None:
        if self.control is None:
            return None
        return [
            None
            if residual is None
            else _for_batch("control residual", residual, batch, 4, device).repeat(halves, 1, 1, 1)
            for residual in self.control
        ]


@dataclass(frozen=True)
class StageBDenoiser:
    """Stage B conditioned on a Stage C latent and the pooled text; it reads no other text.

    latent: Stage C latent ``[n, 16, h, w]``; zeros in the unconditional half. pooled, uncond_pooled: pooled text of
    the prompt and of the negative prompt, ``[n, 1280]`` or ``[n, 1, 1280]``; the second is only needed for guidance.
    """

    model: StageB
    latent: Tensor
    pooled: Tensor
    uncond_pooled: Tensor | None = None

    def prepare(self, noise_cond: Tensor, shape: Sequence[int], guided: bool) -> Predict:
        """See `diffusion.Denoiser`; ValueError when a condition does not fit the batch or a negative is missing."""
        batch, size, device = shape[0], (shape[2], shape[3]), noise_cond.device

        def forward(x: Tensor, prepared: Prepared, index: int, halves: int) -> Tensor:
            return self.model.step(x, prepared, index)

        latent = _for_batch("Stage C latent", self.latent, batch, 4, device)
        pooled = _for_batch("pooled prompt", self.pooled, batch, 3, device)
        if not guided:
            return _one_half(forward, self.model.prepare(noise_cond, latent, pooled, size))
        if self.uncond_pooled is None:
            raise _no_negative("Stage B")
        latents = torch.cat([latent, torch.zeros_like(latent)])
        uncond_pooled = _for_batch("pooled negative prompt", self.uncond_pooled, batch, 3, device)
        both = self.model.prepare(noise_cond, latents, torch.cat([pooled, uncond_pooled.to(pooled.dtype)]), size)
        return _joined_halves(forward, both, batch)
