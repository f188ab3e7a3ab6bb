"""What a run takes, reckoned before it starts, against what it takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.training import targets
from stable_cascade_nodes.cascade_ops.training.activations import kept_by
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.estimate import as_bytes, estimate, optimizer_bytes, table_row
from stable_cascade_nodes.cascade_ops.training.optimizers import make_optimizer
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import (
    ControlNetSettings,
    Data,
    Encoders,
    LoRA,
    Loss,
    Models,
    Optimizer,
    Settings,
    Token,
)

DOCS = Path(__file__).parents[1] / "docs" / "training.md"
SMALL_C = {
    "c_cond": 32,
    "c_hidden": [64, 64],
    "nhead": [1, 1],
    "blocks": [[1, 2], [2, 1]],
    "c_clip_text": 128,
    "c_clip_text_pooled": 128,
    "c_clip_img": 96,
    "dropout": 0.0,
}
SMALL_B = {
    "c_cond": 32,
    "c_hidden": [16, 64],
    "nhead": [-1, 1],
    "blocks": [[1, 1], [1, 1]],
    "block_repeat": [[1, 1], [2, 1]],
    "level_config": ["CT", "CTA"],
    "c_clip": 128,
    "dropout": 0.0,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
DATA = Data(resolution=256, buckets=(1.0,))
RUNS = {
    "stage_c": {"network": SMALL_C},
    "stage_b": {"network": SMALL_B, "loss": Loss(rescale=1.0)},
    "stage_a": {"network": {"bottleneck_blocks": 1, "c_hidden": 16, "codebook_size": 8}},
    "latent_encoder": {"encoders": Encoders(maps=(3, 4), previewer={"c_hidden": 16})},
    "text_encoder": {"network": CLIP, "encoders": Encoders(attributes={"a": 2}, token_attributes={"b": 3})},
    "image_encoder": {"network": {**CLIP, "image_size": 56, "patch_size": 28}},
    "lora": {"lora": LoRA(rank=3)},
    "lora with DoRA and a token": {"lora": LoRA(rank=2, dora=True, modules=("",)), "tokens": (Token("[x]", "red"),)},
    "lcm": {"lora": LoRA(rank=3, modules=("",))},
    "textual_inversion": {"tokens": (Token("[x]", "red", vectors=2),)},
    "controlnet": {},
    "controlnet of super_resolution": {"controlnet": ControlNetSettings("super_resolution")},
    "ip_adapter": {},
}


@pytest.fixture(autouse=True)
def bundled_models_only(tmp_path, monkeypatch):
    """`auto` finds no other models than the tiny ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASCADE_MODELS", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def settings_for(name, **changes):
    return Settings(name.split()[0], "out", **{"data": DATA, "batch_size": 2, **RUNS[name], **changes})


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, Optimizer(ema=0.9)) for name in RUNS), ("stage_b", Optimizer("adafactor"))]
)
def test_weights_gradients_and_optimizer_state_are_exact(name, optimizer):
    settings = settings_for(name, optimizer=optimizer)
    found = estimate(settings)
    objective = targets.build(settings, Parts(settings.models))
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    state = make_optimizer(trained, optimizer)
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    state.step()
    gradients = sum(p.grad.numel() * 4 for p in trained.values())
    assert (found.trained, found.tensors) == (sum(p.numel() for p in trained.values()), len(trained))
    assert (found.gradients, found.average) == (gradients, gradients if optimizer.ema else 0)
    kept = (value for row in state.state.values() for value in row.values())
    assert found.optimizer == sum(value.numel() * value.element_size() for value in kept)


def real_bytes(settings):
    """What autograd keeps of a real step on the CPU, weights left out; and the step's frozen weights."""
    objective = targets.build(settings, Parts(settings.models)).train()
    batch = {"loss_weight": torch.ones(2), "name": ["a", "b"], "caption": ["a red circle", "a [x]"]}
    batch |= {"image": torch.rand(2, 3, 256, 256), "stage_c_latent": torch.randn(2, 16, 6, 6)}
    batch |= {"stage_a_latent": torch.randn(2, 4, 64, 64), "image_embedding": torch.randn(2, 1, 96)}
    encoder = Parts().load("text_encoder").module
    batch |= {"text": torch.randn(2, 77, encoder.width), "text_pooled": torch.randn(2, 1, encoder.pooled_width)}
    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in objective.parameters()}
    weights |= {p.untyped_storage().data_ptr() for held in vars(objective).values() for p in parameters_in(held)}
    alive = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(batch, Draws(0, 0, [0, 1]))
    return sum(sizes.values())


def parameters_in(held):
    for thing in held if isinstance(held, list) else [held]:
        network = getattr(thing, "network", thing)
        if isinstance(network, nn.Module):
            yield from network.parameters()


@pytest.mark.parametrize("name", ["stage_c", "stage_b", "lora", "lcm", "textual_inversion", "controlnet", "ip_adapter"])
def test_activations_are_what_a_real_step_keeps(name):
    """Real kernels keep some numbers more, such as the statistics of a norm or the sums of an attention."""
    settings = settings_for(name)
    real, reckoned = real_bytes(settings), estimate(settings).activations
    assert 0.93 * real < reckoned <= 1.02 * real


def test_a_larger_batch_keeps_as_much_more():
    one, four = (estimate(settings_for("stage_c", batch_size=size)).activations for size in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)


def chain():
    """Three blocks of a linear layer and a GELU on [2, 4] floats, 32 bytes each."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)))


def test_what_is_kept_by_a_known_chain():
    model, x = chain(), torch.randn(2, 4)
    kept = kept_by(lambda: model(x), model, False, model.parameters())
    assert kept.plain == 6 * 32, "the input of every layer; weights are not activations"
    assert kept.checkpointed == 3 * 32 + 32, "three inputs, and the inside of one block at a time"
    assert kept.frozen == []


def test_autocast_keeps_halves_and_the_casts_of_weights():
    model, x = chain(), torch.randn(2, 4)
    kept = kept_by(lambda: model(x), model, True, model.parameters())
    cast = 4 * 4 * 2
    assert kept.plain == 6 * 16 + 2 * cast, "nothing is before the first layer that would need its weight"
    assert kept.checkpointed == 32 + 2 * 16 + 3 * cast + 3 * 4 * 2, "casts of weights and biases last through the step"


def test_frozen_weights_are_told_from_activations():
    model, x = chain(), torch.randn(2, 4)
    model[0].requires_grad_(False)
    kept = kept_by(lambda: model(x), [], False, [])
    assert {id(p) for p in kept.frozen} == {id(p) for p in model[0].parameters()}
    frozen_too = kept_by(lambda: model.requires_grad_(False)(x.requires_grad_()), [], False, [])
    assert frozen_too.plain == 3 * 32, "a frozen linear layer keeps nothing, a GELU its input"


def test_checkpointing_and_bfloat16_keep_less_of_a_large_batch():
    plain = estimate(settings_for("stage_c", batch_size=16)).activations
    assert estimate(settings_for("stage_c", batch_size=16, gradient_checkpointing=True)).activations < 0.5 * plain
    assert estimate(settings_for("stage_c", batch_size=16, precision="bfloat16")).activations < 0.8 * plain


def test_frozen_weights_take_what_their_precision_takes():
    whole, half = (estimate(settings_for("lora", precision=precision)) for precision in ("float32", "bfloat16"))
    assert whole.frozen == half.frozen > 3_000_000
    assert whole.weights - half.weights == 2 * whole.frozen


def test_a_file_to_start_from_is_measured_by_its_header():
    settings = settings_for("stage_c", models=Models(init=bundled("stage_c").path), network={})
    assert estimate(settings).trained == Parts().load("stage_c").info.parameters


def test_samples_of_all_processes_and_parts_of_a_batch_are_counted(monkeypatch):
    settings = settings_for("ip_adapter", steps=10, optimizer=Optimizer(accumulation=3))
    assert estimate(settings).samples == 10 * 2 * 3
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert estimate(settings).samples == 10 * 2 * 3 * 4


def test_an_estimate_leaves_random_numbers_and_autocast_alone():
    state, autocast = torch.get_rng_state(), torch.autocast
    estimate(settings_for("lora", precision="bfloat16"))
    assert torch.equal(torch.get_rng_state(), state) and torch.autocast is autocast


def test_it_is_told_in_words():
    text = estimate(settings_for("lora", steps=1000)).describe()
    assert text.startswith("training lora\n  trained      ")
    assert "2 pictures of 256 x 256" in text and text.endswith("1,000 steps, 2,000 samples")
    assert "not estimated for this target" in estimate(settings_for("stage_a")).describe()
    assert [as_bytes(size) for size in (5, 5e3, 5.25e9)] == ["5 bytes", "5.0 kB", "5.2 GB"]


def test_eight_bit_state_is_two_bytes_a_weight_and_a_scale_for_each_256():
    assert optimizer_bytes((4096, 256), "adamw8bit") == 2 * 4096 * 256 + 2 * 4 * 4096
    assert optimizer_bytes((16,), "adamw8bit") == 2 * 16 * 4


@pytest.mark.parametrize("row", ["LoRA on 1B lite"])
def test_the_documents_table_is_what_the_command_prints(row):
    assert table_row(row) in DOCS.read_text(encoding="utf-8").splitlines()
