"""The cases of the whole chain: from a prompt to pictures, against diffusers' prior and decoder pipelines.

Both sides get the same weights, steps and guidance and draw the same noise: diffusers takes one generator per picture,
seeded as ours are. Ours samples without shift and without the rescaling of guidance, which diffusers' scheduler and
pipelines do not know. Two differences remain, see `matching_scheduler`: they are taken out for the check that both make
the same picture, and left in where the time is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..cascade_ops.checkpoints import FileInfo
from ..cascade_ops.diffusion import log_snr_at, noise_cond
from ..cascade_ops.handles import StageHandle
from ..cascade_ops.pipeline import CascadePipeline
from ..cascade_ops.stages import SamplingSettings
from ..cascade_ops.text import TextEncoder
from ..cascade_ops.tokenizer import SEQUENCE_LENGTH, VOCABULARY_SIZE
from .comparing import Sides
from .diffusers_models import diffusers_model
from .models import CONFIGS, bytes_of, random_stage, random_weights
from .replaying import NAME, replayed_pipeline
from .stage_cases import GUIDANCE_B, GUIDANCE_C, STEPS_B, STEPS_C, Setting, exact_time_embedding

if TYPE_CHECKING:
    from diffusers import DDPMWuerstchenScheduler
    from transformers import CLIPTokenizer

PROMPT = "a large red circle on the left of a small blue square on a white background"
_SEED = 7
# Mean difference of two pictures, of the whole range; so little that some of 255 values are the next one.
_PICTURE_TOLERANCE = 2e-4

# CLIP ViT-bigG/14's text model, and a small one.
_TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "published": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    "small": {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2},
}
_PROJECTION = {"published": 1280, "small": 24}


def text_to_image(family: str, batch: int, setting: Setting) -> Sides:
    """family: ``tiny``, the bundled weights; ``lite`` or ``full``, random ones of the published sizes."""
    if family == "tiny":
        pipeline = CascadePipeline.load("tiny", device=setting.device)
        guidance, steps, pixels = (2.0, 2.0), (STEPS_C, STEPS_B), 256
        if setting.quick:
            steps = (2, 2)
    else:
        pipeline = _random_pipeline(family, setting)
        guidance, steps, pixels = (GUIDANCE_C, GUIDANCE_B), (setting.steps, setting.steps), 1024
        if setting.quick:
            pixels = 128
    settings = SamplingSettings(shift=1.0, rescale=0.0)

    def generate(pipeline: CascadePipeline) -> list:
        return pipeline.generate(
            PROMPT,
            width=pixels,
            height=pixels,
            seed=_SEED,
            batch_size=batch,
            steps_c=steps[0],
            steps_b=steps[1],
            guidance_c=guidance[0],
            guidance_b=guidance[1],
            settings_c=settings,
            settings_b=settings,
        )

    replayed = replayed_pipeline(pipeline, setting.device)
    theirs = theirs_to_check = None
    if setting.wants("theirs"):
        pipelines = diffusers_pipelines(pipeline)
        theirs = _chain(*pipelines, batch, pixels, steps, guidance)
        matching = [type(each)(**{**each.components, "scheduler": matching_scheduler()}) for each in pipelines]
        theirs_to_check = _chain(*matching, batch, pixels, steps, guidance)
    unets = bytes_of(pipeline.stage_c.module) * steps[0] + bytes_of(pipeline.stage_b.module) * steps[1]
    once = bytes_of(pipeline.text_encoder.network) * 2 + bytes_of(pipeline.stage_a.module) * batch
    notes = [f"{steps[0]} steps of Stage C, {steps[1]} of Stage B, guidance {guidance[0]:g} and {guidance[1]:g}"]
    if family == "tiny":
        notes.append("float32 on every device, as models of that size run")
    return Sides(
        partial(generate, pipeline) if setting.wants("ours") else None,
        theirs,
        {} if replayed is None or not setting.wants("ours") else {NAME: partial(generate, replayed)},
        moved=unets + once + 3 * batch * pixels**2,
        tolerance=_PICTURE_TOLERANCE,
        difference=picture_difference,
        theirs_to_check=theirs_to_check,
        notes=notes,
    )


def picture_difference(ours: list, theirs: list) -> float:
    """Mean absolute difference of the pictures that differ most, of the whole range; infinite for other sizes."""
    if [picture.size for picture in ours] != [picture.size for picture in theirs]:
        return float("inf")
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(np.float32(first) - np.float32(second)).mean()) / 255 for first, second in pairs)


def diffusers_tokenizer() -> CLIPTokenizer:
    """transformers' CLIP tokenizer over the vocabulary that is bundled here; nothing is fetched."""
    from transformers import CLIPTokenizer

    from ..cascade_ops.tokenizer import _read_vocabulary

    vocabulary, merges = _read_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=SEQUENCE_LENGTH)


def diffusers_pipelines(pipeline: CascadePipeline) -> tuple[Any, Any]:
    """diffusers' prior and decoder pipelines over the same weights."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline

    tokenizer, text_encoder = diffusers_tokenizer(), pipeline.text_encoder.module.module

    def model(handle: StageHandle) -> Any:
        return diffusers_model(handle.stage, handle.info.config, handle.module.state_dict())

    prior, decoder, vqgan = (model(stage) for stage in (pipeline.stage_c, pipeline.stage_b, pipeline.stage_a))
    exact_time_embedding(prior)
    exact_time_embedding(decoder)
    shared = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    first = StableCascadePriorPipeline(**shared, prior=prior, scheduler=DDPMWuerstchenScheduler())
    second = StableCascadeDecoderPipeline(**shared, decoder=decoder, scheduler=DDPMWuerstchenScheduler(), vqgan=vqgan)
    return first, second


def matching_scheduler() -> DDPMWuerstchenScheduler:
    """diffusers' scheduler, but for two things that ours does as the release does.

    The first step tells the model the noise level that the latent has, 0.9936 for a signal of 1e-4, where diffusers
    says 1. The last step gives the clean latent that was predicted, where diffusers ends a little before it.
    """
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenSchedulerOutput

    class MatchingScheduler(DDPMWuerstchenScheduler):
        def set_timesteps(self, num_inference_steps=None, timesteps=None, device=None):
            super().set_timesteps(num_inference_steps, timesteps, device)
            self.timesteps[0] = noise_cond(log_snr_at(1.0))

        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            if self.previous_timestep(timestep)[0] > 0:
                return super().step(model_output, timestep, sample, generator, return_dict)
            kept = self._alpha_cumprod(timestep, sample.device)[0].float()
            clean = (sample - (1 - kept).sqrt() * model_output) / kept.sqrt()
            return DDPMWuerstchenSchedulerOutput(prev_sample=clean.to(model_output.dtype))

    return MatchingScheduler()


def _chain(
    first: Any, second: Any, batch: int, pixels: int, steps: tuple[int, int], guidance: tuple[float, float]
) -> Callable[[], list]:
    for each in (first, second):
        each.set_progress_bar_config(disable=True)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(_SEED + number) for number in range(batch)]

    def run() -> list:
        prior = first(
            prompt=PROMPT,
            negative_prompt="",
            height=pixels,
            width=pixels,
            num_inference_steps=steps[0],
            guidance_scale=guidance[0],
            num_images_per_prompt=batch,
            generator=generators(),
        )
        return second(
            image_embeddings=prior.image_embeddings,
            prompt=PROMPT,
            negative_prompt="",
            num_inference_steps=steps[1],
            guidance_scale=guidance[1],
            generator=generators(),
        ).images

    return run


def _random_pipeline(family: str, setting: Setting) -> CascadePipeline:
    size = "small" if setting.quick else family

    def handle(stage: str, size: str) -> StageHandle:
        module = random_stage(stage, size, device=setting.device, dtype=setting.dtype)
        if stage == "stage_a":
            module.out_block[0].bias.fill_(0.5)  # pictures in the middle of the range, where nothing is clamped away
        return _handle(stage, module, module, size, CONFIGS[stage][size])

    return CascadePipeline(
        _random_text_encoder(setting),
        handle("stage_c", size),
        handle("stage_b", size),
        handle("stage_a", "small" if setting.quick else "full"),
    )


def _random_text_encoder(setting: Setting) -> StageHandle:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    size = "small" if setting.quick else "published"
    config = {**_TEXT_CONFIGS[size], "hidden_act": "gelu"}
    text_config = CLIPTextConfig(**config, vocab_size=VOCABULARY_SIZE, projection_dim=_PROJECTION[size])
    with torch.device("meta"):
        shapes = CLIPTextModelWithProjection(text_config).state_dict()
    weights = random_weights(shapes, 0, setting.device, setting.dtype)
    encoder = TextEncoder.from_state_dict(weights, config)
    return _handle("text_encoder", encoder, encoder.module, size, config)


def _handle(stage: str, module: Any, network: nn.Module, size: str, config: dict[str, Any]) -> StageHandle:
    info = FileInfo(
        path=Path("random"),
        stage=stage,
        size=size,
        rank=2,
        layout="original",
        prefix="",
        dtypes=(),
        parameters=sum(tensor.numel() for tensor in network.parameters()),
        tensors=len(network.state_dict()),
        weight_bytes=bytes_of(network),
        config=dict(config),
        unknown=(),
        defaults={"width": 1024, "height": 1024, "guidance": 1.0, "steps": 20, "shift": 1.0},
    )
    return StageHandle(stage, module, info, f"{size}, random")
