"""Stage C latents of a few prompts, to see what a training has learned so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..denoisers import StageCDenoiser, TextCondition
from ..diffusion import Guidance, draw_noise, image_generators, sample
from ..handles import StageHandle
from ..models import StageC
from ..sizes import stage_c_size
from ..stages import encode_text
from .settings import Settings

_RELEASE = {"guidance": 4.0, "shift": 2.0, "sampler": "ddpm"}


class StageCSampler:
    """Samples a Stage C that is being trained, at the size it is trained on.

    defaults: guidance and shift of that model, the release's where they are empty; sampler, ddpm where it is not said.
    """

    def __init__(self, text_encoder: StageHandle, settings: Settings, defaults: dict[str, Any] | None = None):
        self.text_encoder, self.side = text_encoder, settings.data.resolution
        self.defaults = {**_RELEASE, **(defaults or {})}

    def encode(self, prompts: list[str]) -> TextCondition:
        """The prompts, cut to one sequence of 77 tokens each: ``[N, 77, C]`` and ``[N, P]``."""
        encoded = [encode_text(self.text_encoder, prompt) for prompt in prompts]
        length = min(text.hidden.shape[1] for text in encoded)
        return TextCondition(
            torch.cat([text.hidden[:, :length] for text in encoded]), torch.cat([text.pooled for text in encoded])
        )

    @torch.no_grad()
    def __call__(self, module: StageC, prompts: list[str], seed: int, steps: int, **attached: Any) -> Tensor:
        """Latents ``[N, 16, h, w]``; picture i has the seed ``seed + i``. attached: see `StageCDenoiser`."""
        with evaluating(module):
            uncond = self.encode([""])
            cond = self.encode(prompts)
            device = next(module.parameters()).device
            shape = (len(prompts), module.embedding[1].in_channels, *stage_c_size(self.side, self.side))
            generators = image_generators(seed, len(prompts))
            return sample(
                StageCDenoiser(module, cond, uncond, **attached),
                draw_noise(generators, shape, device),
                steps=steps,
                sampler=self.defaults["sampler"],
                shift=self.defaults["shift"],
                guidance=Guidance(self.defaults["guidance"]),
                generators=generators,
            ).latent


class evaluating:
    """Evaluation mode inside the block, and the modes of all submodules as they were after it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        for part, training in self.modes:
            part.training = training
