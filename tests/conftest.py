"""Small random models of every stage, as files and in folders laid out as ComfyUI's."""

from pathlib import Path
from types import SimpleNamespace

import pytest

# "conditions" first: what it sets must stand before another one imports torch.
pytest_plugins = ["conditions", "attachment_kit", "editor", "graphs_kit", "host_kit"]

TEXT_WIDTH, POOLED_WIDTH = 64, 32
DEFAULTS_C = {"width": 128, "height": 96, "guidance": 3.0, "steps": 20, "shift": 1.5}
DEFAULTS_B = {"guidance": 1.2, "steps": 10, "shift": 1.0}
FILES = {
    "stage_c": "diffusion_models/c.safetensors",
    "stage_b": "diffusion_models/b.safetensors",
    "stage_a": "vae/a.safetensors",
    "text_encoder": "text_encoders/t.safetensors",
    "previewer": "vae_approx/p.safetensors",
}


def randomised(module, seed, scale=0.3):
    """All weights random, those too that start at zero, so that every input has an effect on the output."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / fan**0.5 * 3)
    return module.eval()


def normalised(encoder):
    """Statistics of the batch norms fitted to noise: a random network as deep answers all pictures alike without."""
    import torch

    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        encoder.train()(torch.rand(16, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    return encoder.eval()


def small_modules(seed=0):
    """Stage -> (module, constructor arguments) of a few thousand weights each."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from stable_cascade_nodes.cascade_ops.models import Previewer, StageA, StageB, StageC

    stage_c = {
        "c_cond": 32,
        "c_hidden": [64, 64],
        "nhead": [1, 1],
        "blocks": [[1, 1], [1, 1]],
        "c_clip_text": TEXT_WIDTH,
        "c_clip_text_pooled": POOLED_WIDTH,
        "c_clip_img": 24,
        "dropout": 0.0,
    }
    stage_b = {
        "c_cond": 32,
        "c_hidden": [16, 64],
        "nhead": [-1, 1],
        "blocks": [[1, 1], [1, 1]],
        "block_repeat": [[1, 1], [1, 1]],
        "level_config": ["CT", "CTA"],
        "c_clip": POOLED_WIDTH,
        "dropout": 0.0,
    }
    stage_a = {"bottleneck_blocks": 1, "c_hidden": 16, "codebook_size": 8}
    previewer = {"c_hidden": 16}
    text = {"num_attention_heads": 2, "hidden_act": "gelu"}
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=96,
            num_hidden_layers=1,
            projection_dim=POOLED_WIDTH,
            bos_token_id=49406,
            eos_token_id=49407,
            **text,
        )
    )
    parts = {
        "stage_c": (randomised(StageC(**stage_c), seed + 1), stage_c),
        "stage_b": (randomised(StageB(**stage_b), seed + 2), stage_b),
        "stage_a": (randomised(StageA(**stage_a), seed + 3), stage_a),
        "previewer": (randomised(Previewer(**previewer), seed + 4), previewer),
        "text_encoder": (randomised(encoder, seed + 5), text),
    }
    # Pictures in the middle of 0..1, where nothing is clamped away.
    with torch.no_grad():
        parts["stage_a"][0].out_block[0].weight.mul_(0.001)
        parts["stage_a"][0].out_block[0].bias.fill_(0.5)
        parts["previewer"][0].blocks[-1].weight.mul_(0.1)
        parts["previewer"][0].blocks[-1].bias.fill_(0.5)
    return parts


def save_models(root: Path, parts, name=None):
    """Write the models into `root` as a models folder; returns stage -> path."""
    from stable_cascade_nodes.cascade_ops.checkpoints import save

    defaults = {"stage_c": DEFAULTS_C, "stage_b": DEFAULTS_B}
    paths = {}
    for stage, (module, config) in parts.items():
        paths[stage] = root / FILES[stage]
        save(module, paths[stage], stage=stage, config=config, defaults=defaults.get(stage), name=name)
    return paths


@pytest.fixture(scope="session")
def small_family(tmp_path_factory):
    """`models`, a folder with one small file per stage, and `paths` to them. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("small") / "models"
    return SimpleNamespace(models=root, paths=save_models(root, small_modules()))


@pytest.fixture(scope="session")
def handles(small_family):
    """The small family, loaded: stage -> handle."""
    from stable_cascade_nodes.cascade_ops.handles import load_stage

    return {stage: load_stage(path, stage) for stage, path in small_family.paths.items()}


@pytest.fixture(scope="session")
def combined(small_family, tmp_path_factory):
    """The small family as a pair of combined checkpoints in ComfyUI's layout: file name -> path."""
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    prefixes = {
        "c.safetensors": {
            "stage_c": "model.diffusion_model.",
            "text_encoder": "text_encoder.clip_g.transformer.",
            "previewer": "vae.previewer.",
        },
        "b.safetensors": {"stage_b": "model.diffusion_model.", "stage_a": "vae."},
    }
    folder = tmp_path_factory.mktemp("combined")
    for name, parts in prefixes.items():
        tensors = {
            prefix + key: tensor
            for stage, prefix in parts.items()
            for key, tensor in load_file(small_family.paths[stage]).items()
        }
        main = next(iter(parts))
        with safe_open(small_family.paths[main], "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["cascade.config"])
        save_file(tensors, folder / name, metadata)
    return {name: folder / name for name in prefixes}


@pytest.fixture
def host(small_family):
    """A backend with the small family for nodes that are called by hand."""
    from nodes_kit import TestBackend

    from stable_cascade_nodes.nodes import runtime

    backend = TestBackend(small_family.models)
    with runtime.using(backend):
        yield backend


@pytest.fixture
def empty_host(tmp_path):
    """The same without files of the user's, and without bundled ones but those that a test puts there."""
    from nodes_kit import TestBackend

    from stable_cascade_nodes.cascade_ops import catalog
    from stable_cascade_nodes.nodes import runtime

    with runtime.using(TestBackend(tmp_path / "models")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "_BUNDLED_FOLDER", tmp_path / "weights")
        yield tmp_path
