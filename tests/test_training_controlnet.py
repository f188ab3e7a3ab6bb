"""Training ControlNets: each kind learns to help a frozen Stage C, and its file can be loaded and gone on with."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from control_kit import BATCH, EMBEDDING, ENCODER, settings, train, world, write_world

from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file, load
from stable_cascade_nodes.cascade_ops.control import Faces, write_faces
from stable_cascade_nodes.cascade_ops.control.start import start_from_encoder
from stable_cascade_nodes.cascade_ops.diffusion import add_noise, noise_cond
from stable_cascade_nodes.cascade_ops.models import ControlNet, LatentEncoder
from stable_cascade_nodes.cascade_ops.models.controlnet import default_proj_blocks
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.objective import trained_parameters
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.targets import build

NETWORK = {name: ENCODER[name] for name in ("widths", "depths")}
KINDS = ("canny", "inpainting", "super_resolution", "identity")
STEPS = {"canny": 60, "inpainting": 60, "super_resolution": 150, "identity": 60}
CHANNELS = {"canny": 1, "inpainting": 4, "super_resolution": 4, "identity": EMBEDDING}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Each kind, trained once: the objective, and its loss before and after."""
    made = {}

    def of(kind):
        if kind not in made:
            objective = objective_of(folder, kind)
            before = unseen_loss(objective)
            train(list(trained_parameters(objective).values()), objective, STEPS[kind], 1e-2)
            made[kind] = objective, before, unseen_loss(objective)
        return made[kind]

    return of


def objective_of(folder, kind, **more):
    chosen = settings(folder, kind, **more)
    return build(chosen, Parts(chosen.models))


@torch.no_grad()
def unseen_loss(objective):
    """On samples that are not trained on, always with the same noise."""
    return sum(objective(world(7000 + i)[0], Draws(1, i, range(BATCH))).loss.item() for i in range(4))


def denoised(objective, batch, control):
    """What Stage C makes of very noisy latents in one step."""
    latent = batch["stage_c_latent"]
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    log_snr = torch.full((len(latent),), -3.0)
    noised = add_noise(latent, noise, log_snr)
    with torch.no_grad():
        residuals = objective.controlnet(objective.control(batch, Draws(9, 0, range(len(latent))))) if control else None
        empty = objective.loss.conditions(batch, Draws(9, 0, range(len(latent))))
        predicted = objective.stage_c(noised, noise_cond(log_snr), *empty, control=residuals)
    signal = torch.sigmoid(log_snr).sqrt()[:, None, None, None]
    return (noised - (1 - signal**2).sqrt() * predicted) / signal


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_control_brings_the_latent_nearer(trained, kind):
    objective, before, after = trained(kind)
    assert after < 0.85 * before
    unseen, _ = world(5000, 64)
    truth = unseen["stage_c_latent"]
    without, with_ = ((denoised(objective, unseen, control) - truth).square().mean() for control in (False, True))
    assert with_ < 0.75 * without


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_control_changes_nothing(folder, kind):
    objective, (batch, _) = objective_of(folder, kind), world(1)
    assert torch.equal(denoised(objective, batch, True), denoised(objective, batch, False))
    assert objective.control(batch, Draws(0, 0, range(BATCH))).shape[1] == CHANNELS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_as_what_was_trained(trained, folder, tmp_path, kind):
    objective, *_ = trained(kind)
    (path,) = objective.export(tmp_path, "mine")
    info = inspect_file(path)
    assert (path.name, info.stage, info.config) == ("mine.safetensors", "controlnet", objective.config)
    assert info.control == {"kind": kind, "base": "custom"}
    loaded, _ = load(path, "controlnet")
    batch, _ = world(7)
    control = objective.control(batch, Draws(0, 0, range(BATCH)))
    ours, theirs = (net(control) for net in (objective.controlnet, loaded))
    assert len(ours) == len(theirs)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    going_on = objective_of(folder, kind, init=str(path))
    assert torch.equal(denoised(going_on, batch, True), denoised(objective, batch, True))
    assert trained_parameters(going_on).keys() == trained_parameters(objective).keys()


def test_only_the_controlnet_is_trained_and_saved(trained):
    objective, *_ = trained("super_resolution")
    assert {name.split(".")[0] for name in objective.state_dict()} == {"controlnet"}
    assert not any(parameter.requires_grad for parameter in objective.stage_c.parameters())
    assert not objective.stage_c.training


def test_samples_follow_their_pictures(trained):
    objective, *_ = trained("super_resolution")
    batch, there = world(6000, 64)
    latents = objective.sample([""] * 64, list(batch["image"]), seed=0, steps=20)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None, None]
    found = (latents * signs).mean(dim=(1, 2)) > 0
    assert 0.2 < there.float().mean() < 0.8
    assert (found == there.bool()).float().mean() > 0.85
    assert objective.sample([""], [], seed=0, steps=2) is None
    with pytest.raises(ValueError, match="3 sample pictures for 2 prompts"):
        objective.sample(["", ""], list(batch["image"][:3]), seed=0, steps=2)


def test_super_resolution_and_inpainting_show_samples(trained):
    batch, _ = world(6000, 2)
    for kind in ("inpainting", "super_resolution"):
        latents = trained(kind)[0].sample(["", ""], list(batch["image"]), seed=0, steps=2)
        assert latents.shape == (2, 4, 2, 2)
        assert latents.isfinite().all()
    assert trained("identity")[0].sample([""], list(batch["image"][:1]), seed=0, steps=2) is None


def test_a_sample_is_the_same_whatever_its_batch(trained):
    objective, *_ = trained("inpainting")
    batch, _ = world(8)
    whole = objective(batch, Draws(0, 4, range(BATCH)))
    part = {name: value[5:8] for name, value in batch.items()}
    assert torch.allclose(objective(part, Draws(0, 4, range(5, 8))).error, whole.error[5:8], rtol=1e-4)


def test_batch_norms_keep_their_statistics(folder):
    objective = objective_of(folder, "canny")
    before = {name: value.clone() for name, value in objective.named_buffers()}
    train(list(trained_parameters(objective).values()), objective.train(), 2, 1e-3)
    assert len(before) > 10
    assert all(torch.equal(value, before[name]) for name, value in objective.named_buffers())


def test_gradient_checkpointing_changes_nothing_but_memory(folder):
    batch, _ = world(9)
    gradients = []
    for checkpointed in (False, True):
        objective = objective_of(folder, "canny", gradient_checkpointing=checkpointed)
        objective(batch, Draws(0, 0, range(BATCH))).loss.backward()
        gradients.append(objective.controlnet.projections[0][2].weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_the_models_that_are_given_stay_as_they_are(folder):
    chosen = settings(folder, "canny", gradient_checkpointing=True)
    parts = Parts(chosen.models)
    handle = parts.load("stage_c")
    build(chosen, parts)(world(1)[0], Draws(0, 0, range(BATCH))).loss.backward()
    assert not any("forward" in vars(module) for module in handle.module.modules())
    assert all(parameter.grad is None for parameter in handle.module.parameters())


def test_a_bfloat16_stage_c_trains_a_float32_controlnet(folder):
    chosen = settings(folder, "canny")
    objective = build(chosen, Parts(chosen.models, frozen_dtype="bfloat16"))
    result = objective(world(1)[0], Draws(0, 0, range(BATCH)))
    result.loss.backward()
    assert objective.stage_c.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained_parameters(objective).values())


def test_the_encoder_inside_starts_as_the_latent_encoder(folder):
    encoder, _ = load(folder / "encoder.safetensors", "latent_encoder")
    fresh = {"bottleneck_mode": "effnet", "c_proj": 4, "proj_blocks": [0], **NETWORK}
    image = world(2)[0]["image"]
    theirs = encoder.backbone(normalize_imagenet(image))
    rgb, grey = ControlNet(c_in=3, **fresh).eval(), ControlNet(c_in=1, **fresh).eval()
    assert start_from_encoder(rgb, encoder) == start_from_encoder(grey, encoder) == []
    # The release's first layer has padding for three channels only, and zeros mean black here and grey there.
    with torch.no_grad():
        inside = rgb.backbone[0](image)[..., 1:, 1:], encoder.backbone[0](normalize_imagenet(image))[..., 1:, 1:]
        assert torch.allclose(*inside, atol=1e-4)
        assert torch.allclose(rgb.backbone(image), theirs, atol=0.5 * theirs.std().item())
        one = image[:, :1].contiguous()
        # Without padding everything lies one pixel further.
        moved = F.pad(one, (1, 0, 1, 0)).expand(-1, 3, -1, -1)
        same = grey.backbone[0](one), encoder.backbone[0](normalize_imagenet(moved))[..., 1:32, 1:32]
        assert torch.allclose(*same, atol=1e-4)


def test_a_bottleneck_of_its_own_size_has_a_signal_from_the_start(folder):
    network = {"widths": [4, 4, 8, 8, 12, 12, 16, 24], "depths": [1, 1, 1, 2, 1, 1], "proj_blocks": [0, 3]}
    objective = objective_of(folder, "inpainting", network=network)
    assert {name: objective.config[name] for name in network} == network
    batch, _ = world(3)
    features = objective.controlnet.backbone(objective.control(batch, Draws(0, 0, range(BATCH))))
    assert 0.1 < features.std() < 10
    steered = objective.controlnet(objective.control(batch, Draws(0, 0, range(BATCH))))
    assert [residual is not None for residual in steered] == [True, False, False, True]


def test_the_published_choice_of_blocks_and_smaller_ones():
    assert default_proj_blocks(64) == (0, 4, 8, 12, 51, 55, 59, 63)
    assert default_proj_blocks(32) == (0, 2, 4, 6, 25, 27, 29, 31)
    assert default_proj_blocks(6) == (0, 1, 2, 3, 4, 5)
    assert default_proj_blocks(1) == (0,)


def test_bottlenecks_of_other_sizes_are_known_from_shapes(trained, tmp_path):
    objective, *_ = trained("super_resolution")
    (path,) = objective.export(tmp_path, "n")
    config = inspect_file(path).config
    assert (config["large_widths"], config["large_blocks"]) == ([256, 16, 20], 8)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :])
    silent = inspect_file(path)
    assert {name: silent.config[name] for name in ("large_widths", "large_blocks", "c_in", "c_proj")} == {
        name: config[name] for name in ("large_widths", "large_blocks", "c_in", "c_proj")
    }
    assert (silent.unknown, silent.control) == (("proj_blocks",), {"kind": "super_resolution"})


def test_what_does_not_fit_is_refused(trained, folder, tmp_path):
    canny = str(trained("canny")[0].export(tmp_path, "canny")[0])
    with pytest.raises(ValueError, match="ControlNet for canny, expected inpainting"):
        objective_of(folder, "inpainting", init=canny)
    with pytest.raises(ValueError, match="network describes a new ControlNet"):
        objective_of(folder, "canny", init=canny, network={"proj_blocks": [0]})
    with pytest.raises(ValueError, match="steers residual block 4 and Stage C has 4"):
        objective_of(folder, "canny", network={"proj_blocks": [0, 4]})
    with pytest.raises(ValueError, match="network has 'large_widths', expected arguments of a ControlNet for canny"):
        objective_of(folder, "canny", network={"large_widths": [1, 2, 3]})
    with pytest.raises(ValueError, match="'scribble', expected one of canny"):
        objective_of(folder, "scribble")


def test_identity_wants_whole_faces_of_one_kind(folder, tmp_path):
    chosen = settings(folder, "identity")
    cropped = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, crop="random"))
    with pytest.raises(ValueError, match="expected 'centre' for identity"):
        build(cropped, Parts(chosen.models))
    nameless = dataclasses.replace(chosen, controlnet=dataclasses.replace(chosen.controlnet, embeddings=""))
    with pytest.raises(ValueError, match=r"controlnet\.embeddings is empty"):
        build(nameless, Parts(chosen.models))
    box = torch.zeros(1, 4)
    mixed = {str(n): Faces(box, torch.ones(1, n), 64, 64) for n in (3, 4)}
    path = str(write_faces(tmp_path / "mixed.safetensors", mixed))
    other = dataclasses.replace(chosen, controlnet=dataclasses.replace(chosen.controlnet, embeddings=path))
    with pytest.raises(ValueError, match="3 and 4 numbers"):
        build(other, Parts(chosen.models))
    batch, _ = world(1)
    batch["name"] = ["someone"] * BATCH
    with pytest.raises(ValueError, match="no entry for the picture 'someone'"):
        objective_of(folder, "identity")(batch, Draws(0, 0, range(BATCH)))


def test_an_encoder_of_another_size_leaves_new_layers_new(folder):
    encoder = LatentEncoder(widths=[8, 8, 8, 8, 8, 8, 8, 24], depths=[1, 1, 1, 1, 1, 1])
    net = ControlNet(c_in=4, c_proj=4, proj_blocks=[0], **NETWORK)
    left = start_from_encoder(net, encoder)
    assert left
    assert all(name.startswith("7.") for name in left)
