"""The cases of single stages: one guided step of Stage C, one step of Stage B, Stage A's decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MethodType

import torch
from torch import Tensor, nn

from ..cascade_ops.denoisers import StageBDenoiser, StageCDenoiser, TextCondition
from ..cascade_ops.diffusion import Guidance, log_snr_at, noise_cond, step_times
from ..cascade_ops.diffusion.sampling import Predict
from .comparing import Run, Sides
from .diffusers_models import diffusers_model
from .models import CONFIGS, bytes_of, random_stage
from .replaying import NAME, replayed_step

GUIDANCE_C, GUIDANCE_B = 4.0, 1.1
STEPS_C, STEPS_B = 20, 10
_TOKENS = 77
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """Where and how a case runs. sides: ``both``, ``ours`` or ``theirs``. quick: small models, for tests."""

    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    sides: str = "both"
    quick: bool = False
    steps: int = 2
    folder: str = ""

    @property
    def tolerance(self) -> float:
        """How far the results of two implementations may differ: rounding, through all layers."""
        return 1e-4 if self.dtype == torch.float32 else 0.1

    def wants(self, side: str) -> bool:
        return self.sides in ("both", side)

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)


def _modules(stage: str, size: str, setting: Setting) -> tuple[nn.Module, nn.Module | None]:
    """Ours and diffusers', over the same weights."""
    size = "small" if setting.quick else size
    module = random_stage(stage, size, device=setting.device, dtype=setting.dtype)
    theirs = diffusers_model(stage, CONFIGS[stage][size], module.state_dict()) if setting.wants("theirs") else None
    return module, theirs


def _levels(steps: int, setting: Setting) -> Tensor:
    """What the model is told about the noise in each step of a run."""
    return noise_cond(log_snr_at(step_times(steps)))[:-1].to(setting.device)


def _moved(module: nn.Module, tensors: Sequence[Tensor]) -> int:
    return bytes_of(module) + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stepped(
    setting: Setting,
    denoiser: StageCDenoiser | StageBDenoiser,
    x: Tensor,
    guided: bool,
    step_of: Callable[[Predict], Run],
    theirs: Run,
    tensors: Sequence[Tensor],
    steps: int,
) -> Sides:
    """A prepared step against diffusers' model call, which prepares anew each time."""
    levels = _levels(steps, setting)

    def prepare() -> Predict:
        return denoiser.prepare(levels, x.shape, guided)

    ours, variants = None, {}
    if setting.wants("ours"):
        ours = step_of(prepare())
        replayed = replayed_step(denoiser.model, setting.device)
        if replayed is not None:
            fast = replace(denoiser, step=replayed)
            variants[NAME] = step_of(fast.prepare(levels, x.shape, guided))
    return Sides(
        ours,
        theirs if setting.wants("theirs") else None,
        variants,
        moved=_moved(denoiser.model, tensors),
        tolerance=setting.tolerance,
        prepare=prepare,
        prepared_steps=steps,
    )


def exact_time_embedding(module: nn.Module) -> None:
    """Let diffusers' model embed the noise level in float32, whatever its weights are.

    As it comes it does so in the weights' dtype: in bfloat16 neighbouring levels become one, and the results differ by
    more than rounding. Its speed is that of the same operations.
    """
    embed = type(module).get_timestep_ratio_embedding

    def embedded(self, ratio: Tensor, max_positions: int = 10000) -> Tensor:
        return embed(self, ratio.float(), max_positions).to(self.dtype)

    module.get_timestep_ratio_embedding = MethodType(embedded, module)


def stage_c_step(size: str, batch: int, setting: Setting) -> Sides:
    """One guided step of Stage C for pictures of 1024 x 1024: model call of both halves and guidance."""
    model, theirs = _modules("stage_c", size, setting)
    side = 6 if setting.quick else 24
    x = setting.randn(batch, 16, side, side, seed=1)
    hidden = setting.randn(2 * batch, _TOKENS, model.clip_txt_mapper.in_features, seed=2)
    pooled = setting.randn(2 * batch, 1, model.clip_txt_pooled_mapper.in_features, seed=3)
    levels = _levels(STEPS_C, setting)
    index = STEPS_C // 2
    denoiser = StageCDenoiser(
        model,
        TextCondition(hidden[:batch], pooled[:batch]),
        TextCondition(hidden[batch:], pooled[batch:]),
    )
    guidance = Guidance(GUIDANCE_C, rescale=0.0)

    def step_of(predict: Predict) -> Run:
        return lambda: guidance.combine(*predict(x, index, True), GUIDANCE_C)

    ratio = levels[index].expand(2 * batch)
    picture = torch.zeros(2 * batch, 1, model.clip_img_mapper.in_features, device=x.device, dtype=x.dtype)
    if theirs is not None:
        exact_time_embedding(theirs)

    def their_step() -> Tensor:
        prediction = theirs(
            sample=torch.cat([x] * 2),
            timestep_ratio=ratio,
            clip_text_pooled=pooled,
            clip_text=hidden,
            clip_img=picture,
            return_dict=False,
        )[0]
        cond, uncond = prediction.chunk(2)
        return torch.lerp(uncond, cond, GUIDANCE_C)

    tensors = (x, x, hidden, pooled)
    return _stepped(setting, denoiser, x, True, step_of, their_step, tensors, STEPS_C)


def stage_b_step(size: str, batch: int, guided: bool, setting: Setting) -> Sides:
    """One step of Stage B for pictures of 1024 x 1024."""
    model, theirs = _modules("stage_b", size, setting)
    side, prior_side = (32, 3) if setting.quick else (256, 24)
    halves = 2 if guided else 1
    x = setting.randn(batch, 4, side, side, seed=1)
    prior = setting.randn(batch, 16, prior_side, prior_side, seed=2)
    pooled = setting.randn(halves * batch, 1, model.clip_mapper.in_features, seed=3)
    levels = _levels(STEPS_B, setting)
    index = STEPS_B // 2
    denoiser = StageBDenoiser(model, prior, pooled[:batch], pooled[batch:] if guided else None)
    guidance = Guidance(GUIDANCE_B, rescale=0.0)

    def step_of(predict: Predict) -> Run:
        def step() -> Tensor:
            cond, uncond = predict(x, index, guided)
            return cond if uncond is None else guidance.combine(cond, uncond, GUIDANCE_B)

        return step

    ratio = levels[index].expand(halves * batch)
    effnet = torch.cat([prior, torch.zeros_like(prior)]) if guided else prior
    if theirs is not None:
        exact_time_embedding(theirs)

    def their_step() -> Tensor:
        prediction = theirs(
            sample=torch.cat([x] * 2) if guided else x,
            timestep_ratio=ratio,
            clip_text_pooled=pooled,
            effnet=effnet,
            return_dict=False,
        )[0]
        return torch.lerp(*reversed(prediction.chunk(2)), GUIDANCE_B) if guided else prediction

    tensors = (x, x, prior, pooled)
    return _stepped(setting, denoiser, x, guided, step_of, their_step, tensors, STEPS_B)


def stage_a_decode(pixels: int, setting: Setting) -> Sides:
    """Stage A's decoding of one picture, whole."""
    model, theirs = _modules("stage_a", "full", setting)
    pixels = 64 if setting.quick else pixels
    latent = setting.randn(1, 4, pixels // 4, pixels // 4, seed=1)
    picture = latent.new_empty(1, 3, pixels, pixels, device="meta")

    def ours() -> Tensor:
        return model.decode(latent)

    def their_decode() -> Tensor:
        return theirs.decode(theirs.config.scale_factor * latent, return_dict=False)[0]

    return Sides(
        ours if setting.wants("ours") else None,
        their_decode if setting.wants("theirs") else None,
        moved=_moved(model, (latent, picture)),
        tolerance=setting.tolerance,
    )
