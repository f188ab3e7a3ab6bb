"""LoRA and textual inversion: what is learned does what it was trained for, and the base stays as it was."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lora_kit import deltas, handle_of, small_stage_c

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora, read_tokens
from stable_cascade_nodes.cascade_ops.adapters.lora import apply_lora
from stable_cascade_nodes.cascade_ops.adapters.tokens import with_tokens
from stable_cascade_nodes.cascade_ops.models import StageC
from stable_cascade_nodes.cascade_ops.training import targets
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.lora_layers import add_lora, private_copy
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import (
    Data,
    LoRA,
    Loss,
    Models,
    Optimizer,
    Settings,
    Token,
)
from stable_cascade_nodes.cascade_ops.training.stage_c_samples import StageCSampler
from stable_cascade_nodes.cascade_ops.training.trainer import Trainer

COLOURS = ("red", "blue")
SIDE = 3
# Plus and minus one per channel, each half like the others: of red, of blue, and of a look that the base never sees.
_PATTERNS = torch.tensor([[1, -1] * 8, [1, 1, -1, -1] * 4, [1, 1, 1, 1, -1, -1, -1, -1] * 2]).float()
RED, BLUE, NEW = _PATTERNS[:, None, :, None, None].expand(-1, -1, -1, SIDE, SIDE).unbind()


def settings(folder, target, **changes):
    base = Settings(
        target,
        str(folder),
        name="look",
        steps=60,
        batch_size=8,
        save_every=1000,
        data=Data(resolution=128, caption_dropout=0.0, image_embedding_dropout=1.0),
        optimizer=Optimizer(learning_rate=0.03, weight_decay=0.0, schedule="cosine"),
        loss=Loss(weight="sigmoid"),
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


@pytest.fixture(scope="module")
def taught(encoder):
    """A Stage C that makes the latent of a colour when a caption names it."""
    torch.manual_seed(0)
    widths = {
        "c_cond": 24,
        "c_hidden": [32],
        "nhead": [2],
        "c_clip_text": 64,
        "c_clip_text_pooled": 32,
        "c_clip_img": 24,
    }
    one_level = {"blocks": [[1], [1]], "block_repeat": None, "level_config": ["CTA"], "switch_level": []}
    model = StageC(**widths, **one_level, dropout=0.0)
    text = encoder.module.encode_captions([f"a {colour} one" for colour in COLOURS])
    which, steps = torch.arange(8) % 2, 200
    hidden, pooled, picture = text.hidden[which].detach(), text.pooled[which, None].detach(), torch.zeros(8, 1, 24)
    clean = torch.cat([RED, BLUE])[which]
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.005 * (1 - step / steps)
        draws = Draws(0, step, range(8))
        level = 0.2 + 0.7 * draws.uniform()
        signal, sigma = ((angle * torch.pi / 2)[:, None, None, None] for angle in (level, level))
        signal, sigma = signal.cos(), sigma.sin()
        noised = signal * clean + sigma * draws.normal(16, SIDE, SIDE)
        found = (noised - sigma * model(noised, level, hidden, pooled, picture)) / signal
        optimizer.zero_grad()
        (found - clean).square().mean().backward()
        optimizer.step()
    return handle_of(model.eval().requires_grad_(False), guidance=1.0, shift=1.0)


class Pictures:
    """Endless batches of one latent with captions."""

    def __init__(self, latent, captions, encoder):
        self.latent, self.captions = latent, captions
        self.text = encoder.module.encode_captions(captions)

    def batches(self, first_step, last_step, global_batch, positions):
        for _ in range(first_step, last_step):
            which = [position % len(self.captions) for position in positions]
            yield {
                "stage_c_latent": self.latent.expand(len(which), -1, -1, -1),
                "caption": [self.captions[i] for i in which],
                "text": self.text.hidden[which].detach(),
                "text_pooled": self.text.pooled[which, None].detach(),
                "name": [str(position) for position in positions],
            }


def parts_of(run, taught, encoder):
    return Parts(run.models, {"stage_c": taught, "text_encoder": encoder})


def train(run, taught, encoder, latent, captions):
    """The trained objective; its loss on always the same noise, after training as a share of that before; figures."""
    objective = targets.build(run, parts_of(run, taught, encoder))
    data, figures = Pictures(latent, captions, encoder), []

    @torch.no_grad()
    def loss():
        return objective.eval()(next(data.batches(0, 1, 64, range(64))), Draws(99, 0, range(64))).loss.item()

    before = loss()
    Trainer(objective, data, run, SingleProcess("cpu"), lambda step: figures.append(step.figures)).run()
    return SimpleNamespace(objective=objective, fall=loss() / before, figures=figures)


@torch.no_grad()
def made(module, encoder, prompts):
    """What Stage C takes the clean latents to be at almost pure noise, [N, 16, 3, 3]."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(8, 16, SIDE, SIDE, generator=generator)
    clean = []
    for prompt in prompts:
        text = encoder.encode(prompt)
        hidden, pooled = text.hidden.expand(8, -1, -1), text.pooled[:, None].expand(8, -1, -1)
        level = torch.full((8,), 0.8)
        signal, sigma = torch.cos(level * torch.pi / 2)[0], torch.sin(level * torch.pi / 2)[0]
        eps = module(sigma * noise, level, hidden, pooled, torch.zeros(8, 1, 24))
        clean.append(((sigma * noise - sigma * eps) / signal).mean(0))
    return torch.stack(clean)


def likeness(made, latent):
    """Correlation of each latent made with the one that was to be made."""
    return torch.nn.functional.cosine_similarity(made.flatten(1), latent.reshape(1, -1))


@pytest.fixture(scope="module")
def learned(taught, encoder, tmp_path_factory):
    """A LoRA with a token of two vectors for the new look, written in every dialect that can hold it."""
    folder = tmp_path_factory.mktemp("look")
    run = settings(
        folder, "lora",
        lora=LoRA(rank=2, alpha=2.0, dialects=("comfyui", "diffusers", "onetrainer")),
        tokens=(Token("[look]", "red", vectors=2),),
    )  # fmt: skip
    before = copy.deepcopy(taught.module.state_dict())
    result = train(run, taught, encoder, NEW, ["a [look] one", "one of [look]"])
    assert all(torch.equal(before[name], tensor) for name, tensor in taught.module.state_dict().items())
    result.paths = result.objective.export(folder, "look")
    return result


def test_the_base_was_taught(taught, encoder):
    """What the other tests build on."""
    found = made(taught.module, encoder.module, ["a red one", "a blue one"])
    assert likeness(found, RED)[0] > 0.9 and likeness(found, BLUE)[1] > 0.9
    assert likeness(found, NEW).abs().max() < 0.3


def test_a_lora_learns_a_new_look(learned, taught, encoder):
    assert learned.fall < 0.5
    assert all(figures["captions_with_token"] == 1 for figures in learned.figures)
    with_it = made(learned.objective.module, learned.objective.tokens.text_encoder().module, ["a [look] one"])
    without = made(taught.module, encoder.module, ["a red one", "a [look] one"])
    assert likeness(with_it, NEW) > 0.75 and likeness(without, NEW).max() < 0.1


def test_only_the_changes_are_trained(learned):
    trained = {name for name, parameter in learned.objective.named_parameters() if parameter.requires_grad}
    attention = [f"{side}_blocks.0.2.attention.attn" for side in ("down", "up")]
    expected = {
        f"module.{name}.parametrizations.in_proj_weight.0.{part}" for name in attention for part in ("down", "up")
    }
    expected |= {
        f"module.{name}.out_proj.parametrizations.weight.0.{part}" for name in attention for part in ("down", "up")
    }
    assert trained == expected | {"tokens.delta"}


def test_every_exported_file_does_what_was_trained(learned, taught, encoder):
    assert [path.name for path in learned.paths] == [
        "look.safetensors", "look_diffusers.safetensors", "look_onetrainer.safetensors", "look.safetensors",
    ]  # fmt: skip
    trained = made(learned.objective.module, learned.objective.tokens.text_encoder().module, ["a [look] one"])
    for path in learned.paths[:3]:
        lora = read_lora(path)
        changed, report = apply_lora(taught, lora)
        assert not report.unmatched and not report.unread
        knowing = with_tokens(encoder, lora.tokens).module
        torch.testing.assert_close(made(changed.module, knowing, ["a [look] one"]), trained, rtol=1e-3, atol=1e-4)
        plain = encoder.module.encode("an embedding:look", lambda name: learned.paths[3])
        assert torch.equal(knowing.encode("an [look]").hidden, plain.hidden)
    assert learned.paths[3].parent.name == "embeddings"
    assert dict(read_lora(learned.paths[0]).config) == {
        "rank": 2, "alpha": 2.0, "dora": False, "modules": [".attn"], "base": "Stage C custom (c.safetensors)",
    }  # fmt: skip


def test_samples_show_what_was_learned(learned, taught, encoder):
    prompts = ["a [look] one", "a [look] one"]
    samples = learned.objective.sample(prompts, [], seed=0, steps=8)
    base = StageCSampler(encoder, learned.objective.settings, taught.info.defaults)(taught.module, prompts, 0, 8)
    with_it, without = (likeness(found.mean(dim=(2, 3)), NEW.mean(dim=(2, 3))) for found in (samples, base))
    assert with_it.min() > 0.5 and without.max() < 0.2 and not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("dora", [False, True])
def test_all_layers_without_tokens_and_the_reference_dialect(taught, encoder, tmp_path, dora):
    dialects = ("comfyui",) if dora else ("comfyui", "reference")
    modules = (".attn", "channelwise", "mapper") if dora else (".attn", "channelwise")
    run = settings(tmp_path, "lora", steps=25, lora=LoRA(rank=1, dora=dora, modules=modules, dialects=dialects))
    result = train(run, taught, encoder, NEW, ["a grey one"])
    assert result.fall < 0.6 and result.objective.needs == {"stage_c_latent", "text", "text_pooled"}
    trained = made(result.objective.module, encoder.module, ["a grey one"])
    for path in result.objective.export(tmp_path, "all"):
        changed, report = apply_lora(taught, read_lora(path, taught.module))
        assert not report.unmatched
        torch.testing.assert_close(made(changed.module, encoder.module, ["a grey one"]), trained, rtol=1e-3, atol=1e-4)
    assert result.objective.sample(["a grey one"], [], 0, 2).shape[1] == 16


def test_a_token_alone_learns_what_the_base_can_make(taught, encoder, tmp_path):
    run = settings(tmp_path, "textual_inversion", tokens=(Token("<mine>", "red"),))
    result = train(run, taught, encoder, BLUE, ["a <mine> one"])
    assert result.fall < 0.7
    assert [name for name, p in result.objective.named_parameters() if p.requires_grad] == ["tokens.delta"]
    (path,) = result.objective.export(tmp_path, "mine")
    knowing = with_tokens(encoder, read_tokens(path)).module
    found = made(taught.module, knowing, ["a <mine> one", "a red one"])
    assert likeness(found, BLUE)[0] > 0.85 and likeness(found, BLUE)[1] < 0.3
    assert path == tmp_path / "embeddings" / "mine.safetensors"
    sampled = result.objective.sample(["a <mine> one"], [], seed=0, steps=8).mean(dim=(2, 3))
    plain = StageCSampler(encoder, run, taught.info.defaults)(taught.module, ["a <mine> one"], 0, 8).mean(dim=(2, 3))
    blue = BLUE.mean(dim=(2, 3))
    assert likeness(sampled, blue) > 0.5 and likeness(sampled, blue) > likeness(plain, blue) + 0.2


def test_an_existing_word_learns_another_meaning(taught, encoder, tmp_path):
    run = settings(tmp_path, "textual_inversion", steps=40, tokens=(Token("red"),))
    result = train(run, taught, encoder, BLUE, ["a red one"])
    (token,) = result.objective.tokens.learned()
    assert result.fall < 0.75 and token.token == "red" and token.delta.abs().max() > 0.01
    table = encoder.network.text_model.embeddings.token_embedding.weight
    row = encoder.module.tokenizer.encode("red")
    torch.testing.assert_close(token.vectors, table[row] + token.delta)


def test_captions_without_the_token_teach_nothing(taught, encoder, tmp_path):
    run = settings(tmp_path, "textual_inversion", steps=2, tokens=(Token("[mine]", "red"),))
    result = train(run, taught, encoder, NEW, ["a mine one"])
    assert not result.objective.tokens.delta.any() and result.figures[0]["captions_with_token"] == 0


@pytest.mark.parametrize("target", ["lora", "textual_inversion"])
def test_going_on_from_a_file(learned, taught, encoder, tmp_path, target):
    """The next run starts where the file is."""
    path = learned.paths[0] if target == "lora" else learned.paths[3]
    run = settings(
        tmp_path, target, models=Models(init=str(path)), lora=LoRA(rank=2, alpha=0.5),
        tokens=(Token("[look]", "red", vectors=2),),
    )  # fmt: skip
    parts = parts_of(run, taught, encoder)
    objective = targets.build(run, parts)
    torch.testing.assert_close(objective.tokens.learned()[0].vectors, learned.objective.tokens.learned()[0].vectors)
    if target == "lora":
        found, expected = deltas(objective.lora().weights), deltas(learned.objective.lora().weights)
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)
    for change, problem in (
        ({"tokens": ()}, "run learns none|no tokens"),
        ({"tokens": (Token("[other]"),)}, r"has learned the token '\[look\]'"),
        ({"tokens": (Token("[look]", "red"),)}, "has 2 vectors and the run's 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            targets.build(replace(run, **change), parts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"lora": LoRA(modules=("mlp",))},
            "'mlp' reach no layer of this Stage C.*made of attention, attn, channelwise",
        ),
        ({"lora": LoRA(dialects=())}, "'lora.dialects' is empty"),
        ({"lora": LoRA(dora=True, dialects=("diffusers",))}, "diffusers cannot hold the sizes that DoRA learns"),
        (
            {"lora": LoRA(dialects=("reference",)), "tokens": (Token("[a]", "", vectors=2),)},
            r"'\[a\]' is to have several vectors",
        ),
        ({"tokens": (Token("[a]"), Token("<a>"))}, "'<a>' is named twice|'.a.' is named twice"),
        ({"tokens": (Token("unlearnable"),)}, "is 3 tokens|is 2 tokens"),
    ],
)
def test_settings_that_could_not_end_well(taught, encoder, tmp_path, change, problem):
    run = settings(tmp_path, "lora", **change)
    with pytest.raises(ValueError, match=problem):
        targets.build(run, parts_of(run, taught, encoder))


@pytest.mark.parametrize("dora", [False, True])
def test_training_begins_with_no_change(dora):
    """And the frozen weights stay where they are, in 16 bits too."""
    base = small_stage_c().to(torch.bfloat16)
    network = private_copy(base)
    layers = add_lora(network, LoRA(rank=3, dora=dora, modules=("",)), seed=1)
    first = dict(base.named_parameters())
    for name, layer in layers.items():
        weight = first[name]
        assert layer(weight).dtype == torch.bfloat16
        torch.testing.assert_close(layer(weight.float()), weight.float(), rtol=1e-5, atol=1e-6)
        assert not layer.down.any() and 0.5 < layer.up.std() < 1.6 and layer.up.dtype == torch.float32
    x, text = torch.randn(2, 16, 3, 3), torch.randn(2, 4, 10)
    output = network(x, torch.tensor([0.3, 0.6]), text)
    output.float().square().mean().backward()
    reached = {name for name, layer in layers.items() if layer.down.grad is not None and layer.down.grad.any()}
    assert "down_blocks.0.2.attention.attn.in_proj_weight" in reached and "clf.1.weight" in reached
    frozen = [p for name, p in network.named_parameters() if ".0." not in name.split("parametrizations")[-1]]
    assert all(parameter.grad is None for parameter in frozen)
    assert network.clf[1].parametrizations.weight.original.data_ptr() == base.clf[1].weight.data_ptr()
    assert type(base.clf[1]) is torch.nn.Conv2d


def test_weights_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        base = small_stage_c()
        base.load_state_dict({name: tensor.clone() for name, tensor in base.state_dict().items()}, assign=True)
    network = private_copy(base)
    layers = add_lora(network, LoRA())
    network(torch.randn(1, 16, 3, 3), torch.tensor([0.3]), torch.randn(1, 4, 10)).square().mean().backward()
    assert all(layer.down.grad is not None for layer in layers.values())


def test_the_start_comes_from_the_seed():
    ups = []
    for seed in (1, 1, 2):
        layers = add_lora(small_stage_c(), LoRA(), seed)
        ups.append(torch.cat([layer.up.detach().flatten() for layer in layers.values()]))
    assert torch.equal(ups[0], ups[1]) and not torch.equal(ups[0], ups[2])
