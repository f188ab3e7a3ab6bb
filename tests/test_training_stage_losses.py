"""The losses of Stages B and C: what they draw, what they drop, and that both learn."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stable_cascade_nodes.cascade_ops.checkpoints import load
from stable_cascade_nodes.cascade_ops.denoisers import TextCondition
from stable_cascade_nodes.cascade_ops.diffusion import LOSS_WEIGHTS, noise_cond
from stable_cascade_nodes.cascade_ops.models import StageB, StageC
from stable_cascade_nodes.cascade_ops.training.diffusion_loss import DiffusionLoss
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.memory_saving import checkpoint_blocks
from stable_cascade_nodes.cascade_ops.training.noise import offset_noise, pyramid_noise
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import Data, Loss, Models, Optimizer, Settings
from stable_cascade_nodes.cascade_ops.training.stage_c_loss import StageCLoss
from stable_cascade_nodes.cascade_ops.training.targets import build
from stable_cascade_nodes.cascade_ops.training.trainer import Trainer

TEXT, POOLED, IMAGE = 6, 5, 3
SMALL_C = {
    "c_cond": 16,
    "c_hidden": [16, 16],
    "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]],
    "c_clip_text": 128,
    "c_clip_text_pooled": 128,
    "c_clip_img": 96,
    "dropout": 0.0,
}
SMALL_B = {
    "c_cond": 16,
    "c_hidden": [8, 8, 16, 16],
    "nhead": [-1, -1, 2, 2],
    "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "c_clip": 128,
    "dropout": 0.0,
}


def test_draws_depend_on_seed_step_and_position_alone():
    whole = Draws(1, 5, range(6))
    first = whole.normal(2, 3), whole.uniform(), whole.integers(9, 4)
    part = Draws(1, 5, [4, 2])
    for value, drawn in zip((part.normal(2, 3), part.uniform(), part.integers(9, 4)), first, strict=True):
        assert torch.equal(value, drawn[[4, 2]])
    values = {Draws(*key).normal(1).item() for key in [(1, 5, [0]), (2, 5, [0]), (1, 6, [0]), (1, 5, [1])]}
    assert len(values) == 4
    shares = [torch.rand(1, generator=Draws(1, step, [p]).shared()).item() for step in (5, 6) for p in (0, 3)]
    assert shares[0] == shares[1] != shares[2] == shares[3]


def test_draws_of_many_steps_are_what_they_say():
    draws = Draws(0, 0, range(4000))
    normal, chosen = draws.normal(4), draws.chosen(0.3)
    assert normal.mean().abs() < 0.03 and abs(normal.std() - 1) < 0.02
    assert abs(chosen.float().mean() - 0.3) < 0.03
    assert draws.integers(3).unique().tolist() == [0, 1, 2]


def test_offset_noise_shifts_whole_channels():
    noise = offset_noise((2, 64, 64), Draws(0, 0, range(200)), 0.5)
    means = noise.mean(dim=(2, 3))
    assert means.std().item() == pytest.approx(0.5, rel=0.1)
    plain = offset_noise((2, 64, 64), Draws(0, 0, range(200)), 0.0)
    assert plain.mean(dim=(2, 3)).std() < 0.03


def test_pyramid_noise_has_unit_variance_and_more_of_the_coarse():
    noise = pyramid_noise((4, 64, 64), Draws(0, 0, range(64)))
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)
    # Levels of 16, 8, 4, 2 and 1 cells: 0.75^2 .. 0.75^6, of which the last is one value per channel.
    shares = [0.75 ** (2 * level) for level in range(2, 7)]
    coarse = F.avg_pool2d(noise, 4).var().item()
    assert coarse == pytest.approx((1 / 16 + sum(shares)) / (1 + sum(shares)), rel=0.15)


@pytest.mark.parametrize("name", sorted(LOSS_WEIGHTS))
def test_a_fixed_weight_weights_the_error(name):
    loss = DiffusionLoss(Loss(weight=name))
    latent, draws = torch.randn(6, 4, 8, 8), Draws(0, 0, range(6))
    result = loss(lambda x, r: torch.zeros_like(x), latent, torch.ones_like(latent), draws)
    assert torch.allclose(result.error, torch.ones(6))
    assert result.loss == pytest.approx(LOSS_WEIGHTS[name](result.log_snr).mean().item(), rel=1e-5)
    doubled = loss(
        lambda x, r: torch.zeros_like(x), latent, torch.ones_like(latent), Draws(0, 0, range(6)), torch.full((6,), 2.0)
    )
    assert doubled.loss.item() == pytest.approx(2 * result.loss.item(), rel=1e-5)


def test_the_model_is_told_the_level_of_the_noise_that_it_sees():
    latent = torch.zeros(3, 4, 32, 32)
    seen = {}

    def predict(x, r):
        seen.update(x=x, r=r)
        return x

    draws = Draws(0, 3, range(3))
    noise = draws.normal(4, 32, 32)
    result = DiffusionLoss(Loss(weight="constant"))(predict, latent, noise, draws)
    assert torch.allclose(seen["r"], noise_cond(result.log_snr))
    assert torch.allclose(seen["x"].std(dim=(1, 2, 3)), torch.sigmoid(-result.log_snr).sqrt(), rtol=0.05)


def test_a_shift_moves_the_levels_towards_noise():
    def levels(shift):
        loss = DiffusionLoss(Loss(weight="constant", shift=shift))
        latent = torch.zeros(200, 1, 2, 2)
        return loss(lambda x, r: x, latent, latent, Draws(0, 0, range(200))).log_snr

    moved = (levels(1.0) - levels(4.0)).median().item()
    assert moved == pytest.approx(2 * math.log(4), rel=0.02)


def test_the_adaptive_weight_learns_and_is_kept():
    loss = DiffusionLoss(Loss(weight="adaptive", buckets=24, interpolate=True))
    levels = torch.linspace(-9, 9, 200)
    for _ in range(60):
        loss.observe(levels, torch.where(levels > 0, 0.5, 0.01))
    weights = loss.weight(torch.tensor([5.0, -5.0]))
    assert weights.tolist() == pytest.approx([2.0, 100.0], rel=0.05)
    again = DiffusionLoss(Loss(weight="adaptive", buckets=24, interpolate=True))
    again.load_state(loss.state())
    assert torch.equal(again.weight(levels), loss.weight(levels))
    assert len(DiffusionLoss(Loss()).state()["losses"]) == 300
    assert DiffusionLoss(Loss(weight="p2")).state() == {}


@pytest.mark.parametrize(
    ("limit", "high_noise"), [({}, 300.0), ({"weight_limit": 2e4}, 1e4), ({"weight_limit": 5}, 5.0)]
)
def test_the_adaptive_weight_grows_up_to_its_limit(limit, high_noise):
    loss = DiffusionLoss(Loss(weight="adaptive", buckets=24, interpolate=True, **limit))
    for _ in range(100):
        loss.observe(torch.tensor([-9.3, 9.3]), torch.tensor([1e-4, 0.5]))
        loss.observe(torch.tensor([-9.3]).repeat(8), torch.tensor([1e-4]).repeat(8))
    torch.testing.assert_close(loss.weight(torch.tensor([-9.3])), torch.tensor([high_noise]), rtol=0.01, atol=0)
    torch.testing.assert_close(loss.weight(torch.tensor([9.3])), torch.tensor([2.0]), rtol=0.1, atol=0)


def stage_c_loss(**data):
    empty = TextCondition(torch.full((1, 77, TEXT), -1.0), torch.full((1, POOLED), -1.0))
    return StageCLoss(Settings("stage_c", "", data=Data(**data)), empty, IMAGE)


def test_captions_and_pictures_are_dropped_as_often_as_asked():
    count = 2000
    batch = {
        "text": torch.ones(count, 77, TEXT),
        "text_pooled": torch.ones(count, 1, POOLED),
        "image_embedding": torch.ones(count, 1, IMAGE),
    }
    loss = stage_c_loss(caption_dropout=0.05, image_embedding_dropout=0.9)
    text, pooled, image = loss.conditions(batch, Draws(0, 0, range(count)))
    dropped = text[:, 0, 0] == -1
    assert torch.equal(dropped, pooled[:, 0, 0] == -1)
    assert dropped.float().mean().item() == pytest.approx(0.05, abs=0.015)
    assert (image[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert not loss.reads_pictures or stage_c_loss(image_embedding_dropout=1.0).reads_pictures is False
    without = stage_c_loss(image_embedding_dropout=1.0).conditions(batch, Draws(0, 0, range(count)))[2]
    assert without.shape == (count, 1, IMAGE) and not without.any()


class Repeated:
    """The same few samples at every step."""

    def __init__(self, **tensors):
        self.batch = {**tensors, "name": [str(i) for i in range(len(next(iter(tensors.values()))))]}

    def batches(self, first_step, last_step, global_batch, positions):
        for _ in range(first_step, last_step):
            yield {
                name: [values[place] for place in positions] if name == "name" else values[positions]
                for name, values in self.batch.items()
            }


def latents(count):
    generator = torch.Generator().manual_seed(0)
    return {
        "stage_c_latent": torch.randn(count, 16, 4, 4, generator=generator),
        "stage_a_latent": torch.randn(count, 4, 16, 16, generator=generator),
        "image": torch.rand(count, 3, 64, 64, generator=generator),
        "text": torch.randn(count, 77, 128, generator=generator),
        "text_pooled": torch.randn(count, 1, 128, generator=generator),
        "image_embedding": torch.randn(count, 1, 96, generator=generator),
    }


def run_settings(folder, target, network, **changes):
    base = Settings(
        target,
        str(folder),
        steps=120,
        batch_size=4,
        network=network,
        loss=Loss(weight="adaptive", buckets=24, interpolate=True, rescale=1.0),
        optimizer=Optimizer(learning_rate=5e-3, warmup=5, ema=0.9),
        data=Data(resolution=128),
    )
    return replace(base, **changes)


@pytest.mark.parametrize(("target", "network"), [("stage_c", SMALL_C), ("stage_b", SMALL_B)])
def test_a_stage_learns_from_scratch_and_its_file_loads(tmp_path, target, network):
    settings = run_settings(tmp_path, target, network)
    objective = build(settings, Parts())
    seen = []
    trainer = Trainer(objective, Repeated(**latents(4)), settings, SingleProcess("cpu"), report=seen.append)
    trainer.run()
    errors = [info.error.mean().item() for info in seen]
    assert sum(errors[-20:]) < 0.8 * sum(errors[:20])
    (path,) = objective.export(tmp_path, "result")
    module, info = load(path, target)
    assert info.config["c_hidden"] == network["c_hidden"]
    trained = dict(objective.module.named_parameters())
    assert all(torch.equal(trained[name], value) for name, value in module.named_parameters())
    # Fine-tuning goes on from that file, and a deeper network starts as the same function.
    again = build(replace(settings, network={}, models=Models(init=str(path))), Parts())
    assert all(torch.equal(trained[name], value) for name, value in again.module.named_parameters())
    blocks = [[2] * len(side) for side in network["blocks"]]
    deeper = build(replace(settings, network={"blocks": blocks}, models=Models(init=str(path))), Parts())
    assert len(list(deeper.module.parameters())) > len(trained)


def test_stage_b_encodes_smaller_pictures_when_asked_to_rescale(tmp_path):
    settings = run_settings(tmp_path, "stage_b", SMALL_B, loss=Loss(rescale=0.5, latent_dropout=0.0))
    objective = build(settings, Parts())
    assert objective.needs == {"image", "stage_a_latent", "text_pooled"}
    batch = {"image": torch.rand(2, 3, 256, 256)}
    sizes = {objective.condition(batch, Draws(0, step, [0, 1])).shape[-1] for step in range(30)}
    assert sizes == {4, 5, 6, 7, 8}
    # One size for the whole batch, whichever process asks.
    sides = [objective.condition({"image": batch["image"][:1]}, Draws(0, 1, [p])).shape[-1] for p in (0, 7)]
    assert sides[0] == sides[1]
    assert not any("encoder" in name for name in objective.state_dict())


def test_stage_b_sees_noised_and_dropped_latents(tmp_path):
    loss = Loss(rescale=1.0, condition_noise=0.25, latent_dropout=0.2)
    objective = build(run_settings(tmp_path, "stage_b", SMALL_B, loss=loss), Parts())
    clean = torch.ones(500, 16, 4, 4)
    seen = objective.condition({"stage_c_latent": clean}, Draws(0, 0, range(500)))
    dropped = (seen == 0).flatten(1).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.05)
    kept = seen[~dropped]
    noise = (kept - 1).flatten(1).std(dim=1)
    assert (noise == 0).float().mean().item() == pytest.approx(0.4, abs=0.06)
    assert 0.2 < noise.max() < 0.3


def test_a_share_of_stage_b_sees_white_noise(tmp_path):
    def coarse(**loss) -> torch.Tensor:
        """Variance of each sample's noise once it is averaged over 16 x 16 cells."""
        settings = run_settings(tmp_path, "stage_b", SMALL_B, loss=Loss(rescale=1.0, **loss))
        noise = build(settings, Parts()).noise((4, 64, 64), Draws(0, 0, range(200)))
        assert noise.std().item() == pytest.approx(1.0, abs=0.05)
        return F.avg_pool2d(noise, 16).flatten(1).var(dim=1)

    white, all_pyramid, some = coarse(pyramid_noise=False), coarse(), coarse(pyramid_share=0.3)
    limit = 0.02  # white noise has 1/256
    assert white.max() < limit < all_pyramid.min()
    assert (some > limit).float().mean().item() == pytest.approx(0.3, abs=0.1)
    # Samples without pyramid noise take the offset, like those of a run that has none.
    shifted = coarse(pyramid_share=0.3, offset_noise=0.3)
    assert shifted.quantile(0.1) > white.max()


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = StageC(**SMALL_C)
    torch.nn.init.normal_(plain.clf[1].weight)
    saving = StageC(**SMALL_C)
    saving.load_state_dict(plain.state_dict())
    assert checkpoint_blocks(saving) == 8 and checkpoint_blocks(plain, enabled=False) == 0
    arguments = torch.randn(2, 16, 4, 4), torch.rand(2), torch.randn(2, 7, 128), torch.randn(2, 1, 128)
    for module in (plain, saving):
        module(*arguments).square().sum().backward()
    for (name, first), second in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(second.grad, first.grad, msg=name)
    assert saving.state_dict().keys() == plain.state_dict().keys()


def test_small_encoders_stay_float32_where_the_rest_is_bfloat16():
    parts = Parts(frozen_dtype="bfloat16")
    found = {stage: parts.load(stage).dtype for stage in ("stage_c", "text_encoder", "latent_encoder", "stage_a")}
    half, whole = torch.bfloat16, torch.float32
    assert found == {"stage_c": half, "text_encoder": half, "latent_encoder": whole, "stage_a": whole}
    assert parts.load("stage_c") is parts.load("stage_c")
    assert parts.load("stage_c", trained=True).dtype == whole


def test_a_network_of_a_published_size_can_be_asked_for():
    from stable_cascade_nodes.cascade_ops.checkpoints.loading import ParametersWithoutMemory
    from stable_cascade_nodes.cascade_ops.training.networks import sized_network

    for stage, kind, size, parameters in [
        ("stage_c", StageC, "1B lite", 1_030_785_040),
        ("stage_b", StageB, "700M lite", 699_471_248),
        ("stage_c", StageC, "3.6B", 3_589_103_632),
    ]:
        with torch.device("meta"), ParametersWithoutMemory():
            module = kind(**sized_network(stage, {"size": size}))
        assert sum(p.numel() for p in module.parameters()) == parameters
