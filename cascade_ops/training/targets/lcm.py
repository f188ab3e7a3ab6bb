"""A LoRA for few steps, distilled from the model itself: what the lcm sampler needs.

Source: Luo et al., "Latent Consistency Models" (2023, arXiv 2310.04378) and "LCM-LoRA" (2023, arXiv 2311.05556), on the
consistency distillation of Song et al. (2023, arXiv 2303.01469). The few levels, with a goal each, are after Heek et
al., "Multistep Consistency Models" (2024, arXiv 2403.06807); without teacher steps it is the first stage of Meng et
al., "On Distillation of Guided Diffusion Models" (2022, arXiv 2210.03142), for one guidance and a few levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters.dialects import read_lora
from ...adapters.lora import LoRA
from ...diffusion import Guidance, add_noise, log_snr_at, noise_cond, signal_and_noise, step_times
from ...handles import StageHandle
from ..draws import Draws
from ..lora_layers import switched_off
from ..memory_saving import checkpoint_blocks
from ..objective import Batch, StepResult
from ..parts import Parts
from ..settings import Loss, Settings
from ..stage_c_samples import StageCSampler
from .lora import LoRAObjective, check_dialects

Conditions = Sequence[Tensor]


class LCMObjective(LoRAObjective):
    """Makes one unguided step of the lcm sampler say what many guided steps of the plain model come to.

    Latents are noised to one of the levels at which the sampler will call the model. From there the plain model, which
    is the teacher, goes to the next of these levels in small guided DDIM steps; what the student takes for the clean
    latent there, as it is now, is what it is to say at the first level already. From the last level the teacher goes
    to the end. So the student's answers at the last level become the teacher's, and then those before, one by one.
    Without teacher steps the goal is the teacher's guided answer at the level itself. Either way the guidance is
    learned with it: sampling wants a guidance of 1.

    The weight of the noise's error is the fourth root of noise to signal (of their variances). It lies between none,
    with which errors of the first level, a hundred times as large in the clean latent, cost next to nothing, and that
    of the clean latent's error, with which the first level drowns all others.
    """

    def __init__(self, settings: Settings, handle: StageHandle, text_encoder: StageHandle, start: LoRA | None = None):
        # A diffusion loss that learns nothing of its own.
        super().__init__(replace(settings, loss=Loss(weight="constant")), handle, text_encoder, None, start)
        own, lcm = handle.info.defaults, settings.lcm
        self.shift = lcm.shift or own["shift"]
        self.guidance = Guidance(lcm.guidance or own["guidance"])
        between = max(1, lcm.teacher_steps)
        levels = log_snr_at(step_times(lcm.steps * between), shift=self.shift)
        # [steps, teacher steps + 1]: the levels from each of the sampler's to the next.
        self.levels = levels.unfold(0, between + 1, between)[:, : lcm.teacher_steps + 1]
        self.train()

    def train(self, mode: bool = True) -> LCMObjective:
        """Training mode without dropout: teacher and student are compared as they will sample."""
        super().train(mode)
        self.module.eval()
        return self

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        conditions = self.loss.conditions(batch, draws)
        latent = batch["stage_c_latent"].float()
        levels = self.levels[draws.integers(len(self.levels))]
        first = levels[:, 0]
        noised = _noised(latent, draws.normal(*latent.shape[1:]).to(latent.device), first)
        with torch.no_grad():
            wanted = self._wanted(noised, levels, conditions)
        a, b = _factors(first, noised)
        found = self._noise(noised, first, conditions)
        error = (found - (noised - a * wanted) / b).square().mean(dim=(1, 2, 3))
        weight = torch.exp(-first / 4).to(error.device)
        if "loss_weight" in batch:
            weight = weight * batch["loss_weight"].to(error.device)
        clean_error = (error.detach() * (b / a).flatten().square()).mean()
        return StepResult((error * weight).mean(), error.detach(), first, {"clean_mse": clean_error})

    def _wanted(self, x: Tensor, levels: Tensor, conditions: Conditions) -> Tensor:
        """The clean latents ``[B, C, h, w]`` to be named at the first of ``levels [B, teacher steps + 1]``."""
        with switched_off(self.layers.values()):
            end, noise = self._guided(x, levels[:, 0], conditions)
            if levels.shape[1] == 1:
                return end
            for level in levels.T[1:-1]:
                x = _noised(end, noise, level)
                end, noise = self._guided(x, level, conditions)
        last = levels[:, -1]
        x = _noised(end, noise, last)
        student = _clean(x, self._noise(x, last, conditions), last)
        # At the end of the schedule there is nothing left to say: the teacher's clean latent is the answer.
        ended = (last >= self.levels[-1, -1]).view(-1, 1, 1, 1).to(x.device)
        return torch.where(ended, end, student)

    def _guided(self, x: Tensor, level: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that the teacher sees in `x`."""
        if self.guidance.scale == 1:
            noise = self._noise(x, level, conditions)
        else:
            nothing = (self.loss.hidden, self.loss.pooled, conditions[2].new_zeros(1, 1, 1))
            both = [torch.cat([c, none.to(c).expand_as(c)]) for c, none in zip(conditions, nothing, strict=True)]
            halves = self._noise(torch.cat([x, x]), level.repeat(2), both).chunk(2)
            noise = self.guidance.combine(*halves, self.guidance.scale)
        return _clean(x, noise, level), noise

    def _noise(self, x: Tensor, level: Tensor, conditions: Conditions) -> Tensor:
        """What the model, with the LoRA where it is not switched off, takes for the noise of ``x [B, C, h, w]``."""
        return self.module(x, noise_cond(level).to(x.device), *conditions).float()

    def lora(self) -> LoRA:
        """What was learned so far. It says with which guidance, steps, shift and sampler it is to be sampled."""
        lcm, learned = self.settings.lcm, super().lora()
        config = {**learned.config, "distilled": {"steps": lcm.steps, "guidance": self.guidance.scale}}
        defaults = {"guidance": 1.0, "steps": lcm.steps, "shift": self.shift, "sampler": "lcm"}
        return replace(learned, config=config, defaults=defaults)

    def sample(self, prompts: list[str], pictures: list[Tensor], seed: int, steps: int) -> Tensor:
        """As it is meant to be sampled; `steps` are the settings'."""
        defaults = {"guidance": 1.0, "shift": self.shift, "sampler": "lcm"}
        sampler = StageCSampler(self.plain_encoder, self.settings, defaults)
        return sampler(self.module, prompts, seed, self.settings.lcm.steps)


def _factors(level: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`signal_and_noise` of ``level [B]``, to multiply ``x [B, C, h, w]`` with."""
    a, b = signal_and_noise(level.to(x.device).view(-1, 1, 1, 1))
    return a, b


def _noised(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    return add_noise(clean, noise, level.to(clean.device))


def _clean(x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    a, b = _factors(level, x)
    return (x - b * noise) / a


def build(settings: Settings, parts: Parts) -> LCMObjective:
    """A LoRA of the settings' Stage C for few steps; `models.init` is a LoRA file to go on with.

    Raises:
        ValueError: settings that no file of the chosen dialects could hold, or that do not fit the model or the file
            to go on with; that file has learned words, which this training would lose.
    """
    check_dialects(settings)
    handle, text_encoder = parts.load("stage_c"), parts.load("text_encoder")
    start = None if settings.models.init == "none" else read_lora(settings.models.init, handle.module)
    if start is not None and start.tokens:
        raise ValueError(
            f"The LoRA to go on with has learned the token {start.tokens[0].token!r}, expected none: a LoRA for few "
            "steps has no words of its own; apply both when sampling instead."
        )
    objective = LCMObjective(settings, handle, text_encoder, start)
    checkpoint_blocks(objective.module, settings.gradient_checkpointing)
    return objective
