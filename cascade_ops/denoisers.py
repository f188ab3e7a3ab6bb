"""Stage C and Stage B with their conditions, as denoisers for `diffusion.sample`.

A denoiser prepares its model once per run for the conditional and, when guided, the unconditional half. A guided step
runs both halves as one batch; an unguided one runs the conditional half alone. Conditions are given for the whole
batch or once for all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion.sampling import Predict
from .models import DecoupledAttention, IPAdapter, Prepared, StageB, StageC
from .reuse import Kept, ReusedSteps


class TextCondition(NamedTuple):
    """CLIP text embeddings of one prompt for all images (n = 1) or of one per image (n = B).

    hidden: ``[n, T, 1280]``, the last hidden state before the final norm. pooled: ``[n, 1280]`` or ``[n, 1, 1280]``.
    """

    hidden: Tensor
    pooled: Tensor


class Pictures(NamedTuple):
    """CLIP embeddings of k pictures that Stage C reads beside the text, for all images (n = 1) or for each (n = B).

    embeddings: ``[n, k, E]`` or, for one picture, ``[n, E]``. weights: ``[k]``, how far what Stage C reads of each goes
    from no picture (0) to the picture (1); see `StageC.condition_tokens`. One at 0 beside others still takes a share of
    the attention: leave it out instead.
    """

    embeddings: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, parts: Sequence[tuple[Tensor, float]]) -> Pictures | None:
        """The pictures ``[n, k, E]`` of all parts, those of a part with one weight; None where there are no parts."""
        if not parts:
            return None
        weights = torch.tensor([float(weight) for embeddings, weight in parts for _ in range(embeddings.shape[1])])
        return cls(torch.cat([embeddings for embeddings, _ in parts], dim=1), weights)


class SteppedControl(NamedTuple):
    """What a ControlNet adds to a run of Stage C.

    residuals: ``[n, c, h, w]`` of any size or None, one per residual block, the same for both halves. strength:
    multiplies them. acts: for each step of the run whether they are added; None is every step.
    """

    residuals: Sequence[Tensor | None]
    strength: float = 1.0
    acts: Sequence[bool] | None = None


class SteppedAdapter(NamedTuple):
    """What an IP-Adapter lets a run of Stage C read: embeddings ``[n, k, E]`` of k pictures; zeros in the other half.

    The embeddings are on the device where the adapter computes. weight: of what is read, for all attention blocks or
    one for each. acts: for each step of the run whether it is; None is every step. mask: where, ``[n, H, W]`` of any
    size, the same for both halves; None is everywhere.
    """

    adapter: IPAdapter
    embeddings: Tensor
    weight: float | Sequence[float] = 1.0
    acts: Sequence[bool] | None = None
    mask: Tensor | None = None


def _acting(steppeds: Sequence[SteppedControl | SteppedAdapter], index: int) -> tuple[int, ...]:
    """Numbers of those that act in a step."""
    return tuple(number for number, each in enumerate(steppeds) if each.acts is None or each.acts[index])


class _Residuals:
    """The sum of the controls that act in a step; made anew only where others act than in the step before."""

    def __init__(self, controls: Sequence[SteppedControl], batch: int, size: tuple[int, int], device: torch.device):
        self._controls, self._size = controls, size
        self._residuals = [
            [
                None if r is None else _for_batch("control residual", r, batch, 4, device, keep=True)
                for r in each.residuals
            ]
            for each in controls
        ]
        self._made: tuple[tuple[int, ...], list[Tensor | None] | None] = ((), None)
        self._repeated: list[Tensor | None] | None = None

    def at(self, index: int, halves: int) -> list[Tensor | None] | None:
        """For one or both halves of the batch in a step."""
        acting = _acting(self._controls, index)
        if acting != self._made[0]:
            self._made, self._repeated = (acting, self._sum(acting) if acting else None), None
        residuals = self._made[1]
        if residuals is None or halves == 1:
            return residuals
        if self._repeated is None:
            # One for all pictures serves both halves as it is.
            self._repeated = [r if r is None or len(r) == 1 else r.repeat(halves, 1, 1, 1) for r in residuals]
        return self._repeated

    def _sum(self, acting: tuple[int, ...]) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * max(len(self._residuals[number]) for number in acting)
        for number in acting:
            strength = self._controls[number].strength
            for block, residual in enumerate(self._residuals[number]):
                if residual is None:
                    continue
                if strength != 1:
                    residual = residual.float() * strength
                before = total[block]
                total[block] = residual if before is None else self._added(before.float(), residual.float())
        return total

    def _added(self, first: Tensor, second: Tensor) -> Tensor:
        if first.shape[-2:] != second.shape[-2:]:
            first, second = (_resized(residual, self._size) for residual in (first, second))
        return first + second


def _resized(residual: Tensor, size: tuple[int, int]) -> Tensor:
    """To the size of the latent, as Stage C does it."""
    return F.interpolate(residual, size=size, mode="bilinear", align_corners=True)


def _for_batch(
    name: str, condition: Tensor, batch: int, ndim: int, device: torch.device, *, keep: bool = False
) -> Tensor:
    """A condition expanded to ``[batch, ...]`` with `ndim` dimensions, a missing token axis added.

    keep: leave one for all images as it is.
    """
    if condition.ndim == 2 and ndim == 3:
        condition = condition[:, None]
    if condition.ndim != ndim or condition.shape[0] not in (1, batch):
        raise ValueError(
            f"The {name} has the shape {tuple(condition.shape)}, expected {ndim} dimensions and a batch of 1 or "
            f"{batch}: give one condition for all images or one per image."
        )
    return condition.to(device).expand(len(condition) if keep else batch, *condition.shape[1:])


def _no_negative(stage: str) -> ValueError:
    return ValueError(
        f"Guidance other than 1 needs a negative condition and {stage} was given none: encode a negative prompt "
        "(it may be empty), or set guidance to 1."
    )


Forward = Callable[[Tensor, Prepared, int, int], Tensor]  # x, prepared, step index, how many halves x holds
ModelStep = Callable[..., Tensor]  # as `CascadeUNet.step`


def _light(forward: Forward) -> Forward:
    """In inference mode where nothing is to be differentiated: small models spend a part of a step on bookkeeping."""

    def run(x: Tensor, prepared: Prepared, index: int, halves: int) -> Tensor:
        if torch.is_grad_enabled():
            return forward(x, prepared, index, halves)
        with torch.inference_mode():
            return forward(x, prepared, index, halves)

    return run


def _one_half(forward: Forward, cond: Prepared) -> Predict:
    """Never guided."""
    forward = _light(forward)

    def predict(x: Tensor, index: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        return forward(x, cond, index, 1), None

    return predict


def _joined_halves(forward: Forward, both: Prepared, batch: int) -> Predict:
    """Both halves in one pass when guided; `both` holds the conditional half first."""
    forward = _light(forward)
    cond = both.narrow(0, batch)

    def predict(x: Tensor, index: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        if not guided:
            return forward(x, cond, index, 1), None
        cond_half, uncond_half = forward(torch.cat([x, x]), both, index, 2).chunk(2)
        return cond_half, uncond_half

    return predict


def _separate_halves(forward: Forward, cond: Prepared, uncond: Prepared) -> Predict:
    """One pass per half."""
    forward = _light(forward)

    def predict(x: Tensor, index: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        return forward(x, cond, index, 1), forward(x, uncond, index, 1) if guided else None

    return predict


@dataclass(frozen=True)
class StageCDenoiser:
    """Stage C conditioned on text and, optionally, pictures.

    cond, uncond: text of the prompt and of the negative prompt; `uncond` is only needed for guidance. Their lengths
        may differ; each half then runs by itself, since padding would change what attention sees.
    image, uncond_image: `Pictures`, or CLIP image embeddings ``[n, k, 768]`` or ``[n, 768]``, whose weights are 1; None
        is one embedding of zeros in the conditional half, as in training, and as many zeros as `image` has in the
        unconditional one.
    controls, adapters: of ControlNets and IP-Adapters.
    step: runs the prepared model in place of its own `step`; see `acceleration`.
    """

    model: StageC
    cond: TextCondition
    uncond: TextCondition | None = None
    image: Tensor | Pictures | None = None
    uncond_image: Tensor | Pictures | None = None
    controls: Sequence[SteppedControl] = ()
    adapters: Sequence[SteppedAdapter] = ()
    step: ModelStep | None = None

    def prepare(self, noise_cond: Tensor, shape: Sequence[int], guided: bool) -> Predict:
        """See `diffusion.Denoiser`; ValueError when a condition does not fit the batch or a negative is missing."""
        batch, device = shape[0], noise_cond.device
        residuals = _Residuals(self.controls, batch, self.model.token_size(*shape[2:]), device)
        step = self.step or self.model.step

        def forward(x: Tensor, prepared: Prepared, index: int, halves: int) -> Tensor:
            acting = _acting(self.adapters, index)
            if len(acting) < len(self.adapters):
                prepared = replace(prepared, decoupled=tuple(prepared.decoupled[number] for number in acting))
            return step(x, prepared, index, control=residuals.at(index, halves))

        image = self.image
        if image is None:
            image = self.cond.hidden.new_zeros(1, 1, self.model.clip_img_mapper.in_features)
        cond = self._embeddings("prompt", self.cond, image, batch, device)
        if not guided:
            return _one_half(forward, self._prepared(noise_cond, cond, batch, (1,)))
        if self.uncond is None:
            raise _no_negative("Stage C")
        uncond_image = self.uncond_image
        if uncond_image is None:
            uncond_image = torch.zeros_like(image.embeddings if isinstance(image, Pictures) else image)
        uncond = self._embeddings("negative prompt", self.uncond, uncond_image, batch, device)
        if all(ours.shape == theirs.shape for ours, theirs in zip(cond, uncond, strict=True)):
            pairs = [torch.cat([ours, theirs.to(ours.dtype)]) for ours, theirs in zip(cond, uncond, strict=True)]
            return _joined_halves(forward, self._prepared(noise_cond, pairs, batch, (1, 0)), batch)
        halves = (self._prepared(noise_cond, half, batch, (seen,)) for half, seen in ((cond, 1), (uncond, 0)))
        return _separate_halves(forward, *halves)

    def _prepared(self, noise_cond: Tensor, embeddings: Sequence[Tensor], batch: int, seen: Sequence[int]) -> Prepared:
        """seen: for each half in `embeddings`, 1 where IP-Adapters show their pictures and 0 where they show none."""
        decoupled = [self._attention(each, batch, seen, noise_cond.device) for each in self.adapters]
        text, pooled, image, weights = embeddings
        weighted = any(isinstance(each, Pictures) for each in (self.image, self.uncond_image))
        return self.model.prepare(
            noise_cond, text, pooled, image, decoupled=decoupled, clip_img_weight=weights if weighted else None
        )

    def _attention(
        self, each: SteppedAdapter, batch: int, seen: Sequence[int], device: torch.device
    ) -> DecoupledAttention:
        pictures = _for_batch("picture of the IP-Adapter", each.embeddings, batch, 3, each.embeddings.device)
        # What the adapter learned to read as "no picture" is an embedding of zeros.
        mask = each.mask
        if mask is not None:
            mask = _for_batch("mask of the IP-Adapter", mask, batch, 3, device, keep=True)
            # One for all pictures serves both halves as it is.
            mask = mask if len(mask) == 1 else mask.repeat(len(seen), 1, 1)
        attention = each.adapter.attention(torch.cat([pictures * half for half in seen]), each.weight, mask)
        read = (kv if kv is None else kv.to(device, self.model.dtype) for kv in attention.key_values)
        return replace(attention, key_values=tuple(read))

    @staticmethod
    def _embeddings(
        name: str, text: TextCondition, image: Tensor | Pictures, batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text, pooled text, embeddings of the pictures and their weights ``[batch, k]``."""
        given = image.embeddings if isinstance(image, Pictures) else image
        embeddings = _for_batch("image embedding", given, batch, 3, device)
        count = embeddings.shape[1]
        weights = image.weights if isinstance(image, Pictures) else torch.ones(count)
        if weights.shape != (count,):
            raise ValueError(
                f"{count} pictures for the {name} came with weights of shape {list(weights.shape)}, expected "
                f"[{count}]: give one weight for each picture."
            )
        return (
            _for_batch(name, text.hidden, batch, 3, device),
            _for_batch(f"pooled {name}", text.pooled, batch, 3, device),
            embeddings,
            weights.to(device, torch.float32).expand(batch, count),
        )


@dataclass(frozen=True)
class StageBDenoiser:
    """Stage B conditioned on a Stage C latent and the pooled text; it reads no other text.

    latent: Stage C latent ``[n, 16, h, w]``; zeros in the unconditional half. pooled, uncond_pooled: pooled text of
    the prompt and of the negative prompt, ``[n, 1280]`` or ``[n, 1, 1280]``; the second is only needed for guidance.
    inner: in which steps the inner levels are reused, an approximation; None computes them in all.
    step: runs the prepared model in place of its own `step`; see `acceleration`.
    """

    model: StageB
    latent: Tensor
    pooled: Tensor
    uncond_pooled: Tensor | None = None
    inner: ReusedSteps | None = None
    step: ModelStep | None = None

    def prepare(self, noise_cond: Tensor, shape: Sequence[int], guided: bool) -> Predict:
        """See `diffusion.Denoiser`; ValueError when a condition does not fit the batch or a negative is missing."""
        batch, size, device = shape[0], (shape[2], shape[3]), noise_cond.device
        kept = None if self.inner is None else Kept(self.inner)
        step = self.step or self.model.step

        def forward(x: Tensor, prepared: Prepared, index: int, halves: int) -> Tensor:
            if kept is None:
                return step(x, prepared, index)
            return step(x, prepared, index, inner=kept.at(index))

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
