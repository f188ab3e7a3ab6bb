"""Training Stage A and the latent encoder: losses, fits, and what is written."""

import copy

import pytest
import torch

from stable_cascade_nodes.cascade_ops.checkpoints import load, save
from stable_cascade_nodes.cascade_ops.models import LatentEncoder, Previewer, StageA, StageB
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.kept import KeptPictures
from stable_cascade_nodes.cascade_ops.training.latent_encoder import (
    LatentReaders,
    cell_labels,
    fold_latent,
    previewer_input,
    refit_latent_norm,
)
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.settings import Encoders, Loss, Models, Optimizer, Settings
from stable_cascade_nodes.cascade_ops.training.stage_a import (
    LATENT_STD,
    autoencoder_loss,
    fit_codebook,
    normalize_latent,
)
from stable_cascade_nodes.cascade_ops.training.targets import latent_encoder, stage_a
from stable_cascade_nodes.cascade_ops.training.targets.stage_b import StageBObjective
from stable_cascade_nodes.cascade_ops.training.trainer import Trainer

ENCODER = {"widths": [8] * 8, "depths": [1] * 6}
PREVIEWER = {"c_hidden": 16}
STAGE_A = {"bottleneck_blocks": 1, "c_hidden": 16, "codebook_size": 16}
STAGE_B = {"c_r": 16, "c_cond": 16, "c_hidden": [16, 16], "nhead": [-1, 2], "c_clip": 8, "level_config": ["CT", "CTA"]}
STAGE_B |= {"blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [1, 1]], "dropout": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pictures:
    """Batches of flat pictures with a lighter quarter, and the map of where it is."""

    def __init__(self, side: int = 64):
        colours = torch.rand(64, 3, 1, 1, generator=generator())
        self.images = colours.expand(-1, -1, side, side).clone()
        self.images[:, :, : side // 2, : side // 2] = 1 - colours
        self.maps = torch.zeros(64, 2, 16, 16, dtype=torch.long)
        self.maps[:, :, :8, :8] = (1 + torch.arange(64) % 2).view(64, 1, 1, 1)

    def batches(self, first_step, last_step, global_batch, positions):
        for step in range(first_step, last_step):
            index = torch.tensor([(step * global_batch + position) % 64 for position in positions])
            yield {
                "image": self.images[index],
                "maps": self.maps[index],
                "stage_a_latent": self.images[index][:, [0, 1, 2, 0], ::4, ::4],
                "text_pooled": torch.zeros(len(index), 1, 8),
            }


def trained(objective, settings, until=None):
    """The objective after the run's steps, or the first of them."""
    trainer = Trainer(objective, Pictures(), settings, SingleProcess("cpu", "float32"), stop=stopper(until))
    trainer.run()
    return trainer


def stopper(until):
    steps = iter(range(1, 10_000))
    return lambda: next(steps) == until


def small_stage_a() -> StageA:
    torch.manual_seed(0)
    model = StageA(**STAGE_A).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gammas"):
            torch.nn.init.constant_(parameter, 0.3)
    return model


def test_autoencoder_loss_reports_decibels_and_feels_noise():
    model = small_stage_a()
    image = torch.rand(2, 3, 16, 16, generator=generator())
    quiet, psnr = autoencoder_loss(model, image, torch.zeros(2, 4, 4, 4))
    square = (model.decode(model.encode(image)[0]) - image).square().mean()
    assert psnr.item() == pytest.approx(-10 * square.log10().item(), rel=1e-4)
    loud, _ = autoencoder_loss(model, image, torch.randn(2, 4, 4, 4, generator=generator()) * 5)
    assert loud > quiet


@torch.no_grad()
def test_normalized_latents_have_the_published_scale_and_pictures_stay():
    model = small_stage_a()
    images = torch.rand(40, 3, 16, 16, generator=generator())
    before = model.decode(model.encode(images)[0])
    normalize_latent(model, images)
    latent = model.encode(images)[0]
    assert torch.allclose(latent.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latent.std(dim=(0, 2, 3)) * model.scale_factor, torch.full((4,), LATENT_STD), rtol=1e-3)
    assert torch.allclose(model.decode(latent), before, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 4])
def test_codebook_lies_where_the_latents_are(side):
    model = small_stage_a()
    images = torch.rand(8, 3, side, side, generator=generator())
    distance = [(latent - entries).square().mean() for latent, entries, _ in [model.encode(images, quantize=True)]]
    fit_codebook(model, images, generator())
    latent, entries, indices = model.encode(images, quantize=True)
    assert (latent - entries).square().mean() < 0.5 * distance[0]
    assert len(indices.unique()) > 5


def test_random_parts_are_parts_of_their_own_pictures():
    image = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    parts = stage_a.random_parts(image, 4, Draws(0, 0, [0, 1]))
    for whole, part in zip(image, parts, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(whole[:, y : y + 4, x : x + 4], part)]
        assert len(found) == 1
    assert not torch.equal(parts[0] + 3 * 64, parts[1])  # each has a place of its own
    assert torch.equal(stage_a.random_parts(image, 100, Draws(0, 0, [0, 1])), image)


def stage_a_settings(output, **changes) -> Settings:
    encoders = Encoders(crop=16, fitted_on=24)
    optimizer = Optimizer(learning_rate=3e-3, schedule="cosine", ema=0.9)
    return Settings(
        "stage_a", str(output), steps=40, batch_size=8, network=STAGE_A, encoders=encoders, optimizer=optimizer
    )


def test_stage_a_learns_to_reconstruct_and_is_written_with_its_scale(tmp_path):
    settings = stage_a_settings(tmp_path / "run")
    objective = stage_a.build(settings, None)
    trainer = trained(objective, settings)
    assert sum(trainer.losses[-5:]) < 0.5 * sum(trainer.losses[:5])
    before = copy.deepcopy(objective.module.state_dict())
    (path,) = objective.export(tmp_path, "stage_a")
    assert all(torch.equal(before[name], value) for name, value in objective.module.state_dict().items())
    module, info = load(path, expect="stage_a")
    assert info.config.items() >= STAGE_A.items()
    latent = module.encode(objective.kept.images())[0]
    assert torch.allclose(latent.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-2)


def test_a_resumed_stage_a_writes_the_same_file(tmp_path):
    whole = stage_a_settings(tmp_path / "whole")
    trainer = trained(stage_a.build(whole, None), whole)
    (first,) = trainer.objective.export(tmp_path / "whole", "stage_a")
    cut = stage_a_settings(tmp_path / "cut")
    trained(stage_a.build(cut, None), cut, until=38)
    resumed = trained(stage_a.build(cut, None), cut)
    assert resumed.losses == trainer.losses
    # Its last two batches are 16 pictures: the others it is fitted on come from the checkpoint.
    (second,) = resumed.objective.export(tmp_path / "cut", "stage_a")
    assert first.read_bytes() == second.read_bytes()


def test_stage_a_goes_on_from_a_file(tmp_path):
    path = save(small_stage_a(), tmp_path / "a.safetensors", stage="stage_a", config=STAGE_A)
    settings = Settings("stage_a", str(tmp_path), models=Models(init=str(path)))
    objective = stage_a.build(settings, None)
    assert torch.equal(objective.module.out_block[0].weight, small_stage_a().out_block[0].weight)
    assert all(parameter.requires_grad for parameter in objective.parameters())


def test_kept_pictures_are_the_last_ones_in_one_size():
    kept = KeptPictures(3)
    with pytest.raises(ValueError, match="train for a step"):
        kept.images()
    first, second = torch.rand(2, 3, 8, 12, generator=generator()), torch.rand(2, 3, 6, 10, generator=generator(1))
    kept.add(first)
    kept.add(second)
    images = kept.images()
    assert images.shape == (3, 3, 6, 6)
    assert torch.allclose(images[0], first[1, :, 1:7, 3:9], atol=1 / 500)
    assert torch.allclose(images[1:], second[..., 2:8], atol=1 / 500)
    assert kept.images(4).shape == (3, 3, 4, 4)


def test_cell_labels_pick_what_covers_a_cell():
    labels = torch.zeros(1, 2, 16, 16, dtype=torch.long)
    labels[0, 0, :8, :8] = 3  # a whole cell
    labels[0, 0, :2, 8:12] = 2  # an eighth of a cell is not enough,
    labels[0, 1, 8:11, :8] = 1  # three eighths are
    cells = cell_labels(labels, (2, 2), [7, 10])
    assert cells.tolist() == [[[[3, 0], [0, 0]], [[0, 0], [1, 0]]]]


def test_readers_weight_what_maps_call_foreground():
    torch.manual_seed(0)
    readers = LatentReaders(16, [3, 4], c=16)
    latent, preview = torch.randn(1, 16, 2, 2), torch.zeros(1, 3, 16, 16)
    image, maps = torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, 32, 32, dtype=torch.long)
    image[..., :32, :32] = 1
    maps[:, 0, :16, :16] = 1
    plain = LatentReaders(16, c=16)
    plain.decoder.load_state_dict(readers.decoder.state_dict(), strict=False)
    with_maps, _ = readers.loss(latent, preview, image, maps)
    # The wrong quarter weighs five times as much where the map says that something is there.
    _, figures = readers.loss(latent, preview, image, maps)
    _, unweighted = plain.loss(latent, preview, image)
    assert figures["pixels"] > 1.3 * unweighted["pixels"]
    with_maps.backward()
    assert [name for name, p in readers.named_parameters() if p.grad is None] == []


def unit_encoder() -> LatentEncoder:
    torch.manual_seed(0)
    encoder = LatentEncoder(**ENCODER).eval()
    with torch.no_grad():
        encoder.mapper[0].weight.mul_(1e5)  # a fresh network's features would vanish beside the norm's epsilon
    return encoder


@torch.no_grad()
def test_refit_norm_gives_unit_latents_and_readers_stay_right():
    encoder, images = unit_encoder(), torch.rand(40, 3, 64, 64, generator=generator())
    previewer = Previewer(**PREVIEWER).eval()
    before = encoder(normalize_imagenet(images))
    shown = previewer(before)
    gain, shift = refit_latent_norm(encoder, images)
    latent = encoder(normalize_imagenet(images))
    assert torch.allclose(latent.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-3)
    assert torch.allclose(latent.std(dim=(0, 2, 3)), torch.ones(16), atol=1e-2)
    fold_latent(previewer_input(previewer), gain, shift)
    assert torch.allclose(previewer(latent), shown, atol=1e-3)


def encoder_settings(output, steps=40, **changes) -> Settings:
    encoders = Encoders(noise=0.1, fitted_on=16, **{"maps": (3, 3), "previewer": PREVIEWER, **changes})
    optimizer = Optimizer(learning_rate=5e-3, weight_decay=0.0)
    loss = Loss(buckets=24, interpolate=True, condition_noise=0.2, rescale=1.0)
    return Settings(
        "latent_encoder", str(output), steps=steps, batch_size=8, network=ENCODER, encoders=encoders,
        optimizer=optimizer, loss=loss,
    )  # fmt: skip


def test_the_latent_encoder_learns_what_maps_say_and_is_written_with_its_previewer(tmp_path):
    settings = encoder_settings(tmp_path)
    objective = latent_encoder.build(settings, None)
    modes = []
    objective.encoder.mapper[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer = trained(objective, settings)
    assert sum(trainer.losses[-5:]) < 0.7 * sum(trainer.losses[:5])
    assert modes == [True] * 24 + [False] * 16  # the statistics stay from 60 % on
    paths = objective.export(tmp_path, "tiny")
    assert [path.name for path in paths] == ["tiny.safetensors", "tiny_previewer.safetensors"]
    encoder, info = load(paths[0], expect="latent_encoder")
    assert info.config.items() >= ENCODER.items()
    latent = encoder(normalize_imagenet(objective.kept.images()))
    assert torch.allclose(latent.std(dim=(0, 2, 3)), torch.ones(16), atol=0.05)
    shown = load(paths[1], expect="previewer")[0](latent)
    # What is written shows what the trained pair shows.
    objective.eval()
    expected = objective.previewer(objective.encoder(normalize_imagenet(objective.kept.images())))
    assert torch.allclose(shown, expected, atol=1e-2)


def test_without_maps_pixels_are_enough(tmp_path):
    settings = encoder_settings(tmp_path, steps=2, maps=())
    objective = latent_encoder.build(settings, None)
    assert objective.needs == {"image"}
    assert len(trained(objective, settings).losses) == 2


def joint_objective(settings) -> latent_encoder.LatentEncoderObjective:
    torch.manual_seed(0)
    module = StageB(**STAGE_B)
    torch.nn.init.normal_(module.clf[1].weight, std=0.05)  # zeros would hide whatever the condition does
    torch.nn.init.normal_(module.effnet_mapper[0].weight, std=0.2)
    stage_b = StageBObjective(module, settings, torch.zeros(1, 8), STAGE_B, {})
    return latent_encoder.LatentEncoderObjective(
        unit_encoder(), Previewer(**PREVIEWER), settings, ENCODER, PREVIEWER, stage_b, fine_tuned=True
    )


def test_the_loss_of_stage_b_reaches_the_encoder(tmp_path, monkeypatch):
    objective = joint_objective(encoder_settings(tmp_path, maps=()))
    monkeypatch.setattr(objective.readers, "loss", lambda latent, *_: (torch.zeros(()), {}))
    batch = next(iter(Pictures().batches(0, 1, 8, range(8))))
    result = objective(batch, Draws(0, 0, range(8)))
    assert result.error.shape == result.log_snr.shape == (8,)
    result.loss.backward()
    assert objective.encoder.mapper[0].weight.grad.abs().sum() > 0
    assert objective.stage_b.module.clf[1].weight.grad.abs().sum() > 0


def test_with_stage_b_all_three_are_written_and_fit_together(tmp_path):
    settings = encoder_settings(tmp_path, steps=3, maps=())
    objective = joint_objective(settings)
    assert objective.needs == {"image", "stage_a_latent", "text_pooled"}
    trained(objective, settings)
    assert {"stage_b.losses", "kept"} <= set(objective.state())
    paths = objective.export(tmp_path, "joint")
    assert [path.stem for path in paths] == ["joint", "joint_previewer", "joint_stage_b"]
    stage_b, info = load(paths[2], expect="stage_b")
    assert info.config["c_hidden"] == [16, 16]
    kept = normalize_imagenet(objective.kept.images())
    objective.eval()
    new, old = load(paths[0])[0](kept), objective.encoder(kept)
    assert not torch.allclose(new, old, atol=0.1)
    count = len(kept)
    x, r, text = torch.randn(count, 4, 8, 8, generator=generator()), torch.full((count,), 0.5), torch.zeros(count, 1, 8)
    given, wanted = stage_b(x, r, new, text), objective.stage_b.module(x, r, old, text)
    assert (given - wanted).abs().max() < 0.02 * wanted.std()


def test_a_resumed_joint_run_is_the_run(tmp_path):
    whole = encoder_settings(tmp_path / "whole", steps=4)
    expected = trained(joint_objective(whole), whole)
    cut = encoder_settings(tmp_path / "cut", steps=4)
    trained(joint_objective(cut), cut, until=2)
    resumed = trained(joint_objective(cut), cut)
    assert resumed.losses == expected.losses
    one, other = expected.objective.state_dict(), resumed.objective.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
