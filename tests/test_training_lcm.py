"""A LoRA for few steps: after distillation the lcm sampler ends in few steps where the guided model ends in many."""

import copy
from dataclasses import replace

import pytest
import torch
from lora_kit import handle_of

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora, write_lora
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA as LoadedLoRA
from stable_cascade_nodes.cascade_ops.adapters.lora import apply_lora
from stable_cascade_nodes.cascade_ops.adapters.tokens import LearnedToken
from stable_cascade_nodes.cascade_ops.denoisers import StageCDenoiser
from stable_cascade_nodes.cascade_ops.diffusion import (
    Guidance,
    add_noise,
    draw_noise,
    image_generators,
    log_snr_at,
    noise_cond,
    sample,
    signal_and_noise,
)
from stable_cascade_nodes.cascade_ops.models import StageC
from stable_cascade_nodes.cascade_ops.training import targets
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.lora_layers import switched_off
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import LCM, Data, LoRA, Models, Optimizer, Settings
from stable_cascade_nodes.cascade_ops.training.trainer import Trainer

CAPTIONS = ("a red one", "a blue one")
SIDE, GUIDANCE = 2, 2.0
# Less noise at the start than otherwise: what a model of this size can still see through.
SHIFT = 0.1
# Plus and minus one per channel, each half like the other: what the captions ask for.
PATTERNS = torch.tensor([[1, -1] * 8, [1, 1, -1, -1] * 4]).float()[..., None, None].expand(-1, -1, SIDE, SIDE)


def settings(folder, **changes):
    base = Settings(
        "lcm",
        str(folder),
        name="few",
        steps=100,
        batch_size=16,
        save_every=1000,
        data=Data(resolution=96, caption_dropout=0.0, image_embedding_dropout=1.0),
        optimizer=Optimizer(learning_rate=0.003, weight_decay=0.0, schedule="cosine", beta2=0.99),
        lora=LoRA(rank=8, alpha=8.0, modules=("",)),
        lcm=LCM(steps=2, teacher_steps=3),
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def encoder(handles):
    """A text encoder in which words make more of a difference than random weights would make of them."""
    network = copy.deepcopy(handles["text_encoder"].network)
    with torch.no_grad():
        network.text_model.embeddings.token_embedding.weight.mul_(8)
        for layer in network.text_model.encoder.layers:
            layer.self_attn.v_proj.weight.mul_(4)
            layer.self_attn.out_proj.weight.mul_(4)
    return replace(handles["text_encoder"], module=handles["text_encoder"].module.with_module(network))


class Pictures:
    """Endless batches of the two latents with their captions."""

    def __init__(self, encoder):
        self.text = encoder.module.encode_captions(CAPTIONS)

    def batches(self, first_step, last_step, global_batch, positions):
        which = torch.tensor(positions) % 2
        for _ in range(first_step, last_step):
            yield {
                "stage_c_latent": PATTERNS[which],
                "text": self.text.hidden[which].detach(),
                "text_pooled": self.text.pooled[which, None].detach(),
                "name": [str(position) for position in positions],
            }


@pytest.fixture(scope="module")
def taught(encoder):
    """A Stage C that knows these latents, with and without their caption, though not by heart."""
    torch.manual_seed(0)
    widths = {"c_cond": 24, "c_hidden": [32], "nhead": [2], "c_clip_text": 64, "c_clip_text_pooled": 32}
    one_level = {"blocks": [[1], [1]], "block_repeat": None, "level_config": ["CTA"], "switch_level": []}
    model = StageC(**widths, **one_level, c_clip_img=24, dropout=0.0)
    data, empty, steps, batch_size = Pictures(encoder), encoder.module.encode(""), 250, 16
    optimizer = torch.optim.Adam(model.parameters())
    for step, batch in enumerate(data.batches(0, steps, batch_size, range(batch_size))):
        optimizer.param_groups[0]["lr"] = 0.005 * (1 - step / steps)
        draws = Draws(0, step, range(batch_size))
        level, noise = log_snr_at(draws.uniform(), shift=SHIFT), draws.normal(16, SIDE, SIDE)
        dropped = draws.chosen(0.2)[:, None, None]
        hidden = torch.where(dropped, empty.hidden.detach(), batch["text"])
        pooled = torch.where(dropped, empty.pooled[:, None].detach(), batch["text_pooled"])
        noised = add_noise(batch["stage_c_latent"], noise, level)
        found = model(noised, noise_cond(level), hidden, pooled, torch.zeros(batch_size, 1, 24))
        a, b = signal_and_noise(level)
        optimizer.zero_grad()
        ((found - noise).square().mean((1, 2, 3)) * b / a).mean().backward()
        optimizer.step()
    return handle_of(model.eval().requires_grad_(False), guidance=GUIDANCE, shift=SHIFT)


def objective_of(run, taught, encoder):
    return targets.build(run, Parts(run.models, {"stage_c": taught, "text_encoder": encoder}))


def sampled(module, encoder, steps, sampler, guidance, count=32):
    """Latents of both captions in turn."""
    both, empty = encoder.module.encode_captions(CAPTIONS), encoder.module.encode("")
    which = torch.arange(count) % 2
    text = type(both)(both.hidden[which], both.pooled[which])
    generators = image_generators(3, count)
    return sample(
        StageCDenoiser(module, text, empty), draw_noise(generators, (count, 16, SIDE, SIDE)), steps=steps,
        sampler=sampler, shift=SHIFT, guidance=Guidance(guidance), generators=generators,
    ).latent  # fmt: skip


