"""Training IP-Adapters: the adapter carries what the picture says, and its file can be loaded and gone on with."""

from functools import cache

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file, load, save
from stable_cascade_nodes.cascade_ops.diffusion import add_noise, noise_cond
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.models import IPAdapter, StageC
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.objective import trained_parameters
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import Data, IPAdapterSettings, Loss, Models, Settings
from stable_cascade_nodes.cascade_ops.training.stage_c_loss import StageCLoss, empty_prompt
from stable_cascade_nodes.cascade_ops.training.targets import build
from stable_cascade_nodes.cascade_ops.vision import encode_pictures

BATCH = 16
_TEXT = inspect_file(bundled("text_encoder").path).config
WIDTHS = {"c_clip_text": _TEXT["hidden_size"], "c_clip_text_pooled": _TEXT["projection_dim"], "c_clip_img": 8}
STAGE_C = {
    "c_in": 4, "c_out": 4, "c_cond": 16, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
    "dropout": [0.0, 0.0], **WIDTHS,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "projection_dim": WIDTHS["c_clip_img"] + 2, "hidden_act": "gelu",
}  # fmt: skip
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]])
PATTERNS = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))


@cache
def empty_text():
    return empty_prompt(load_stage(bundled("text_encoder").path, "text_encoder"))


def world(seed, count=BATCH):
    """A batch of pictures in one of three colours, and which; the latent follows from the colour, the text is empty."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.randint(3, (count,), generator=random)
    image = COLOURS[colours][:, :, None, None] + 0.2 * torch.rand(count, 3, 24, 24, generator=random) - 0.1
    batch = {
        "image": image,
        "stage_c_latent": PATTERNS[colours] + 0.05 * torch.randn(count, 4, 2, 2, generator=random),
        "text": empty_text().hidden.expand(count, -1, -1),
        "text_pooled": empty_text().pooled.reshape(1, 1, -1).expand(count, -1, -1),
        "colour": colours,
    }
    return batch, colours


def train(parameters, loss, steps, rate):
    """The losses of `steps` steps of Adam; step n sees ``world(n)``."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses = []
    for step in range(steps):
        value = loss(world(step)[0], Draws(0, step, range(BATCH))).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stage C that reads in a prompt which latent is wanted, and an image encoder of random weights."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    stage_c = StageC(**STAGE_C)
    loss = StageCLoss(settings_of(folder), empty_text(), WIDTHS["c_clip_img"])

    prompts = torch.randn(3, 77, WIDTHS["c_clip_text"], generator=torch.Generator().manual_seed(2))

    def stage_c_loss(batch, draws):
        named = batch["text"] + prompts[batch["colour"]] * draws.chosen(0.7)[:, None, None]
        conditions = loss.conditions({**batch, "text": named}, draws)
        return loss.loss(lambda x, r: stage_c(x, r, *conditions), batch["stage_c_latent"], draws)

    train(list(stage_c.parameters()), stage_c_loss, 400, 4e-3)
    save(stage_c, folder / "stage_c.safetensors", stage="stage_c", config=STAGE_C)
    torch.manual_seed(4)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    save(encoder, folder / "image_encoder.safetensors", stage="image_encoder", config=VISION)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_stage(folder / "image_encoder.safetensors", "image_encoder")


def settings_of(folder, dropout=0.05, tokens=4, init="none"):
    models = Models(
        stage_c=str(folder / "stage_c.safetensors"),
        text_encoder=bundled("text_encoder").path,
        image_encoder=str(folder / "image_encoder.safetensors"),
        init=init,
    )
    data = Data(resolution=85, caption_dropout=0.0)  # latents of 2 x 2
    return Settings(
        "ip_adapter",
        str(folder),
        models=models,
        data=data,
        loss=Loss(weight="constant", shift=4.0),
        ip_adapter=IPAdapterSettings(tokens, dropout),
    )


def objective_of(folder, **more):
    chosen = settings_of(folder, **more)
    return build(chosen, Parts(chosen.models))


def seen(batch, encoder):
    """The batch with the embeddings of its pictures."""
    return {**batch, "image_embedding": encode_pictures(encoder, batch["image"])}


@pytest.fixture(scope="module")
def trained(folder, encoder):
    objective = objective_of(folder)
    parameters = list(trained_parameters(objective).values())
    losses = train(parameters, lambda batch, draws: objective(seen(batch, encoder), draws), 200, 1e-2)
    return objective, losses


def denoised(objective, batch, embeddings, weight=1.0):
    """What Stage C makes of very noisy latents in one step."""
    latent = batch["stage_c_latent"]
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    log_snr = torch.full((len(latent),), -3.0)
    noised = add_noise(latent, noise, log_snr)
    conditions = batch["text"], batch["text_pooled"], torch.zeros(len(latent), 1, WIDTHS["c_clip_img"])
    with torch.no_grad():
        attention = objective.adapter.attention(embeddings, weight)
        predicted = objective.stage_c(noised, noise_cond(log_snr), *conditions, decoupled=[attention])
    signal = torch.sigmoid(log_snr).sqrt()[:, None, None, None]
    return (noised - (1 - signal**2).sqrt() * predicted) / signal


def test_the_loss_falls_and_the_adapter_carries_the_picture(trained, encoder):
    objective, losses = trained
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    batch, colours = world(5000, 64)
    right = encode_pictures(encoder, batch["image"])
    other = right[[int((colours != colour).nonzero()[0]) for colour in colours]]

    def error(embeddings, weight=1.0):
        return (denoised(objective, batch, embeddings, weight) - batch["stage_c_latent"]).square().mean()

    without = error(right, 0)
    assert error(right) < 0.6 * without
    assert error(other) > 1.2 * without
    # Zeros are "no picture": about what Stage C guesses by itself.
    assert error(right) < error(torch.zeros_like(right)) < error(other)


def test_before_the_first_step_nothing_changes(folder, encoder):
    objective, (batch, _) = objective_of(folder), world(1)
    pictures = encode_pictures(encoder, batch["image"])
    assert torch.equal(denoised(objective, batch, pictures), denoised(objective, batch, pictures, 0))
    assert objective.needs == {"stage_c_latent", "text", "text_pooled", "image_embedding"}


def test_samples_follow_their_pictures(trained):
    objective, _ = trained
    batch, colours = world(6000, 8)
    assert set(colours.tolist()) == {0, 1, 2}
    latents = objective.sample([""] * 8, list(batch["image"]), seed=0, steps=8)
    nearest = (latents[:, None] - PATTERNS[None]).square().mean(dim=(2, 3, 4)).argmin(dim=1)
    assert (nearest == colours).float().mean() >= 0.75
    assert objective.sample([""], [], seed=0, steps=2) is None
    with pytest.raises(ValueError, match="3 sample pictures for 2 prompts"):
        objective.sample(["", ""], list(batch["image"][:3]), seed=0, steps=2)


def test_dropouts_are_shares_of_their_own(folder):
    objective = objective_of(folder, dropout=0.2)
    objective.text_dropout, count = 0.3, 4000
    batch = {
        "text": torch.ones(count, 1, WIDTHS["c_clip_text"]),
        "text_pooled": torch.ones(count, 1, WIDTHS["c_clip_text_pooled"]),
        "image_embedding": torch.ones(count, 1, 10),
    }
    objective.loss.hidden = torch.zeros(1, 1, WIDTHS["c_clip_text"])
    objective.loss.pooled = torch.full((1, 1, WIDTHS["c_clip_text_pooled"]), 5.0)
    text, pooled, picture = objective.conditions(batch, Draws(0, 0, range(count)))
    no_text, no_picture = (text == 0).all(dim=(1, 2)), (picture == 0).all(dim=(1, 2))
    assert torch.equal(no_text, (pooled == 5).all(dim=(1, 2)))
    shares = [(a & b).float().mean().item() for a in (no_text, ~no_text) for b in (no_picture, ~no_picture)]
    assert shares == pytest.approx([0.2, 0.3, 0.2, 0.3], abs=0.03)
    assert torch.equal(objective.conditions(batch, Draws(0, 0, range(count)))[2], picture)
    with pytest.raises(ValueError, match=r"0.6 \(picture\), 0 \(text\) and 0.6 \(both\)"):
        objective_of(folder, dropout=0.6)


def test_stage_c_sees_zeros_for_its_own_picture(folder, encoder, monkeypatch):
    objective, (batch, _) = objective_of(folder), world(2)
    pictures, prepare = [], objective.stage_c.prepare
    monkeypatch.setattr(
        objective.stage_c, "prepare", lambda r, *rest, **more: pictures.append(rest[2]) or prepare(r, *rest, **more)
    )
    objective(seen(batch, encoder), Draws(0, 0, range(BATCH)))
    assert [(tuple(picture.shape), picture.abs().max().item()) for picture in pictures] == [((BATCH, 1, 8), 0.0)]


def test_only_the_adapter_is_trained_and_saved(trained):
    objective, _ = trained
    assert {name.split(".")[0] for name in objective.state_dict()} == {"adapter"}
    assert all(name.startswith("adapter.") for name in trained_parameters(objective))
    assert not any(parameter.requires_grad for parameter in objective.stage_c.parameters())
    assert not objective.train().stage_c.training


def test_a_file_loads_as_what_was_trained_and_is_gone_on_with(trained, folder, encoder, tmp_path):
    objective, _ = trained
    (path,) = objective.export(tmp_path, "mine")
    info = inspect_file(path)
    assert (path.name, info.stage, info.config) == ("mine.safetensors", "ip_adapter", objective.config)
    batch, _ = world(7)
    pictures = encode_pictures(encoder, batch["image"])
    loaded, _ = load(path, "ip_adapter")
    theirs, ours = loaded.attention(pictures).key_values, objective.adapter.attention(pictures).key_values
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    going_on = objective_of(folder, init=str(path))
    assert torch.equal(denoised(going_on, batch, pictures), denoised(objective, batch, pictures))
    assert trained_parameters(going_on).keys() == trained_parameters(objective).keys()
    with pytest.raises(ValueError, match=r"mine\.safetensors makes 4 tokens of a picture, expected 8: set ip_adapter"):
        objective_of(folder, init=str(path), tokens=8)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"c_hidden_per_block": [32]}, "odd.safetensors: The IP-Adapter has keys and values for 1 attention block "),
        ({"c_image": 9}, "reads image embeddings of 9 numbers, expected 10"),
        ({"c_cond": 24}, "has tokens 24 wide, expected 16"),
    ],
)
def test_going_on_with_a_file_for_something_else_is_refused(trained, folder, tmp_path, changes, found):
    config = {**trained[0].config, **changes}
    save(IPAdapter(**config), tmp_path / "odd.safetensors", stage="ip_adapter", config=config)
    with pytest.raises(ValueError, match=found):
        objective_of(folder, init=str(tmp_path / "odd.safetensors"))
