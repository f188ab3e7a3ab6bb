"""Small ControlNets and IP-Adapters for the small family's Stage C, as files and loaded."""

import json
import shutil

import pytest
import torch
from conftest import normalised, randomised
from nodes_kit import load, run

from stable_cascade_nodes.cascade_ops import stages
from stable_cascade_nodes.cascade_ops.checkpoints import save
from stable_cascade_nodes.cascade_ops.control.start import calibrate_batch_norms
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.models import ControlNet, IPAdapter, LatentEncoder

WIDTHS = {"widths": [8, 8, 8, 8, 8, 8, 8, 16], "depths": [1, 1, 1, 1, 1, 1]}
CONTROLNETS = {
    "canny": {"c_in": 1, "bottleneck_mode": "effnet", **WIDTHS},
    "inpainting": {"c_in": 4, "bottleneck_mode": "effnet", **WIDTHS},
    "super_resolution": {"c_in": 16, "bottleneck_mode": "large", "large_widths": [32, 16, 24], "large_blocks": 1},
    "identity": {"c_in": 8, "bottleneck_mode": "simple"},
}
IMAGE_WIDTH = 24
SETTINGS = stages.SamplingSettings(steps=4)


def differ(first, second):
    assert (first - second).abs().max() > 1e-3


def near(first, second, tolerance=1e-5):
    """Equal but for the rounding of another order of sums, relative to the largest value."""
    assert (first - second).abs().max() <= tolerance * second.abs().max()


def saved_controlnet(path, kind, seed=20, scale=0.3, **changes):
    config = CONTROLNETS[kind] | {"c_proj": 64, "proj_blocks": [0, 2, 3]} | changes
    metadata = {"cascade.control": json.dumps({"kind": kind, "base": "custom"})}
    network = randomised(ControlNet(**config), seed, scale)
    if config["bottleneck_mode"] == "effnet":
        calibrate_batch_norms(network)
    return save(network, path, stage="controlnet", config=config, metadata=metadata)


def saved_adapter(path, seed=30, **changes):
    config = {"c_image": IMAGE_WIDTH, "c_cond": 32, "c_hidden_per_block": [64] * 4, "tokens": 2} | changes
    return save(randomised(IPAdapter(**config), seed), path, stage="ip_adapter", config=config)


def saved_latent_encoder(path, seed=40):
    config = {"c_latent": 16, **WIDTHS}
    encoder = normalised(randomised(LatentEncoder(**config), seed))
    return save(encoder, path, stage="latent_encoder", config=config)


@pytest.fixture(scope="session")
def controlnets(tmp_path_factory):
    """Kind -> handle of a small ControlNet for the small family's Stage C."""
    folder = tmp_path_factory.mktemp("controlnets")
    paths = {kind: saved_controlnet(folder / f"{kind}.safetensors", kind) for kind in CONTROLNETS}
    return {kind: load_stage(path, "controlnet") for kind, path in paths.items()}


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """A small IP-Adapter for the small family's Stage C."""
    return load_stage(saved_adapter(tmp_path_factory.mktemp("adapters") / "adapter.safetensors"), "ip_adapter")


@pytest.fixture(scope="session")
def prompts(handles):
    """The prompt and the negative prompt, encoded."""
    return [stages.encode_text(handles["text_encoder"], text) for text in ("a red circle", "")]


@pytest.fixture
def sampled(prompts):
    """Samples a Stage C handle: `sampled(handle, batch=1, size=(128, 96), **settings)`."""

    def run(handle, batch=1, size=(128, 96), seed=3, prompts=prompts, **settings):
        latent = stages.empty_latent(handle, *size, batch)
        chosen = stages.replace(SETTINGS, **settings)
        return stages.sample_stage_c(handle, *prompts, latent, seed=seed, settings=chosen).samples

    return run


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def image_encoder(path):
    """A random CLIP vision model as wide as the small Stage C's picture embeddings."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = {
        "image_size": 28,
        "patch_size": 14,
        "hidden_size": 32,
        "intermediate_size": 32,
        "projection_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    torch.manual_seed(0)
    return save(CLIPVisionModelWithProjection(CLIPVisionConfig(**config)), path, stage="image_encoder", config=config)


@pytest.fixture(scope="session")
def more_models(small_family, tmp_path_factory):
    """The small family with a file of every kind that steers it."""
    root = shutil.copytree(small_family.models, tmp_path_factory.mktemp("more") / "models")
    for folder in ("controlnet", "clip_vision", "loras"):
        (root / folder).mkdir()
    for kind in ("canny", "inpainting", "super_resolution"):
        saved_controlnet(root / f"controlnet/{kind[:2]}.safetensors", kind)
    saved_adapter(root / "controlnet/ip.safetensors")
    saved_latent_encoder(root / "vae/e.safetensors")
    image_encoder(root / "clip_vision/v.safetensors")
    return root


@pytest.fixture
def fuller_host(host, more_models):
    """The backend for nodes, with the files of `more_models`."""
    host.root = more_models
    return host


def samples(answer):
    return answer["result"][0]["samples"]


def controlled(stage_c=None, **changes):
    """A Stage C with a canny control of a picture in the shape that `sample_c` makes."""
    made = run("CascadeCannyControl", image=noise(1, 60, 100, 3), low=100, high=200, side=224)
    inputs = {
        "stage_c": stage_c or load("CascadeLoadStageC"),
        "controlnet": load("CascadeLoadControlNet", file="auto (canny)"),
        "control": made["result"][0],
        "strength": 1.0,
        "start": 1.0,
        "end": 0.0,
    }
    return run("CascadeApplyControlNet", **inputs | changes)
