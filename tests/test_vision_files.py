"""Image encoders of every published layout load, by name and by `auto`, and the parts of a combined checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from attachment_kit import noise, saved_latent_encoder
from nodes_kit import TestBackend, load, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoints import MANIFESTS, header_only, prefixed
from test_checkpoints_loading import clip_shapes, fill_state_dict

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops.catalog import BUNDLED
from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file
from stable_cascade_nodes.cascade_ops.handles import StageHandle
from stable_cascade_nodes.cascade_ops.on_demand import StageOnDemand
from stable_cascade_nodes.cascade_ops.vision import encode_pictures
from stable_cascade_nodes.nodes import files, runtime

# What config.json of the published image_encoder folder says, beside names and versions.
PUBLISHED_CONFIG = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 224,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}


def vision_shapes(width=1024, layers=24, projection=768, patch=14, patches=256):
    """Tensor names and shapes of a CLIP image encoder as transformers saves it."""
    embeddings = {
        "class_embedding": [width],
        "patch_embedding.weight": [width, 3, patch, patch],
        "position_embedding.weight": [patches + 1, width],
    }
    return clip_shapes("vision_model", width, layers, projection, **embeddings)


def folder_with(root, tensors, config):
    """A transformers folder inside of `root`; returns the model file."""
    folder = root / "image_encoder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if isinstance(next(iter(tensors.values())), torch.Tensor):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        header_only(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    return folder / "model.safetensors"


# Files of the published size, told by their headers ------------------------------------------------------------


def test_the_published_encoder_is_recognised_in_every_layout(empty_host):
    checkpoints, clip_vision = (empty_host / "models" / name for name in ("checkpoints", "clip_vision"))
    shapes = vision_shapes()
    in_folder = folder_with(clip_vision, shapes, PUBLISHED_CONFIG)
    # Older versions of transformers store the positions too; such files were passed on alone.
    alone = header_only(
        clip_vision / "clip_vit_l.safetensors", shapes | {"vision_model.embeddings.position_ids": [1, 257]}, "F16"
    )
    text = clip_shapes("text_model", 768, 12, 768, **{"token_embedding.weight": [49408, 768]})
    text |= {"text_model.embeddings.position_embedding.weight": [77, 768], "logit_scale": []}
    whole = header_only(clip_vision / "clip.safetensors", shapes | text)
    stored = prefixed(MANIFESTS["stage_c_3.6b"], "model.diffusion_model.") | prefixed(shapes, "clip_l_vision.")
    combined = header_only(checkpoints / "stable_cascade_stage_c.safetensors", stored, "BF16")
    for path in (in_folder, in_folder.parent, alone, whole, combined):
        part = inspect_file(path).component("image_encoder")
        assert (part.size, part.rank, part.parameters, part.leftover) == ("ViT-L/14", 0, 303_966_208, ())
        assert (
            part.config.items()
            >= {
                "hidden_act": "quick_gelu",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "projection_dim": 768,
                "image_size": 224,
                "patch_size": 14,
            }.items()
        )
    listed = files.choices("image_encoder")
    assert listed[2:] == [
        "clip.safetensors",
        "clip_vit_l.safetensors",
        "image_encoder/model.safetensors",
        "stable_cascade_stage_c.safetensors",
    ]
    for name in listed[2:]:
        assert files.find("image_encoder", name).path.endswith(name)
    # Equal ones in the order of the list; with the Stage C that the combined file holds they all fit.
    assert files.find("image_encoder", "auto").name == "clip.safetensors"
    for path in (whole, alone, in_folder):
        path.unlink()
    assert files.find("image_encoder", "auto").name == "stable_cascade_stage_c.safetensors"


# Small files of the same layouts, loaded -----------------------------------------------------------------------

SMALL = {"width": 48, "layers": 2, "projection": 24, "patches": 4}


@pytest.fixture(scope="module")
def weights():
    return fill_state_dict(vision_shapes(**SMALL))


def small_config(**changes):
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "projection_dim": 24}
    return PUBLISHED_CONFIG | sizes | {"image_size": 28, "num_attention_heads": 3} | changes


@pytest.fixture
def own_host(small_family, tmp_path):
    """A host with the small family and room for more files."""
    root = shutil.copytree(small_family.models, tmp_path / "models")
    (root / "checkpoints").mkdir()
    (root / "clip_vision").mkdir()
    with runtime.using(TestBackend(root)):
        yield root


def by_transformers(weights, pictures, **changes):
    """What transformers makes of the weights with that configuration."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from stable_cascade_nodes.cascade_ops.vision import clip_pixels

    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**small_config(**changes))).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(clip_pixels(pictures, 28)).image_embeds


def test_a_transformers_folder_loads_by_its_model_file(own_host, weights):
    folder_with(own_host / "clip_vision", weights, small_config())
    pictures = noise(2, 3, 30, 40)
    for choice in ("image_encoder/model.safetensors", "auto"):
        answer = run("CascadeLoadImageEncoder", file=choice)
        (handle,) = answer["result"]
        assert answer["ui"]["text"] == ["image encoder custom (image_encoder/model.safetensors), float32"]
        torch.testing.assert_close(encode_pictures(handle, pictures)[:, 0], by_transformers(weights, pictures))
    # Heads and activation come from config.json: the shapes would say neither.
    for change in ({"num_attention_heads": 1}, {"hidden_act": "gelu"}):
        other = by_transformers(weights, pictures, **change)
        assert (encode_pictures(handle, pictures)[:, 0] - other).abs().max() > 1e-3


def test_auto_leaves_out_the_encoders_of_other_models(own_host):
    header_only(own_host / "clip_vision/CLIP-ViT-H.safetensors", vision_shapes(1280, 32, 1024))
    header_only(own_host / "clip_vision/clip_vit_l.safetensors", vision_shapes())
    # The small Stage C reads 24: neither of the larger ones, which would come first.
    assert files.find("image_encoder", "auto").name == BUNDLED
    header_only(own_host / "clip_vision/z.safetensors", vision_shapes(**SMALL | {"width": 64}))
    assert files.find("image_encoder", "auto").name == "z.safetensors"


def test_the_config_of_another_encoder_is_not_taken(own_host, weights):
    folder = own_host / "clip_vision"
    save_file(fill_state_dict(vision_shapes(**SMALL | {"width": 64})), folder / "v.safetensors")
    (folder / "config.json").write_text(json.dumps(small_config(num_attention_heads=3)))
    handle = load("CascadeLoadImageEncoder", file="v.safetensors")
    assert (handle.info.config["num_attention_heads"], handle.info.config["hidden_act"]) == (1, "gelu")


def test_a_single_file_loads(own_host, weights):
    wide = fill_state_dict(vision_shapes(**SMALL | {"width": 64}))
    positions = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    save_file(wide | positions, own_host / "clip_vision/clip_l.safetensors")
    handle = load("CascadeLoadImageEncoder", file="clip_l.safetensors")
    loaded = handle.module.state_dict()
    assert set(loaded) == set(wide) and all(torch.equal(loaded[name], wide[name]) for name in wide)


# The combined checkpoint ---------------------------------------------------------------------------------------


@pytest.fixture
def combined_host(own_host, combined, tmp_path):
    """The same with combined files; the one called c+ holds both encoders of pictures."""
    stored = load_file(combined["c.safetensors"])
    stored |= prefixed(fill_state_dict(vision_shapes(**SMALL | {"width": 64})), "clip_l_vision.")
    stored |= prefixed(load_file(saved_latent_encoder(tmp_path / "e.safetensors")), "vae.encoder.")
    with safe_open(combined["c.safetensors"], "pt") as file:
        save_file(stored, own_host / "checkpoints/c+.safetensors", file.metadata())
    for path in combined.values():
        shutil.copy(path, own_host / "checkpoints")
    return own_host


def of_checkpoint(name="c+.safetensors", **more):
    return run("CascadeLoadCheckpoint", stage_c_file=name, stage_b_file="b.safetensors", **more)


def test_the_part_of_the_combined_file_loads_by_name_and_by_auto(combined_host):
    for choice in ("c+.safetensors", "auto"):
        handle = load("CascadeLoadImageEncoder", file=choice)
        assert (handle.stage, handle.name) == ("image_encoder", "c+.safetensors")
    with pytest.raises(ValueError, match="expected image encoder"):
        load("CascadeLoadImageEncoder", file="c.safetensors")


def test_new_outputs_come_last():
    node = NODE_CLASS_MAPPINGS["CascadeLoadCheckpoint"]
    assert node.RETURN_NAMES[:5] == ("stage_c", "text_encoder", "stage_b", "stage_a", "previewer")
    assert node.RETURN_NAMES[5:] == ("image_encoder", "latent_encoder")
    assert node.RETURN_TYPES[5:] == ("CASCADE_IMAGE_ENCODER", "CASCADE_LATENT_ENCODER")


def test_the_checkpoint_loader_gives_both_encoders_when_they_are_used(combined_host, monkeypatch):
    from stable_cascade_nodes.nodes import loaders

    read = []
    real = loaders._load
    monkeypatch.setattr(loaders, "_load", lambda file, stage, *more: read.append(stage) or real(file, stage, *more))
    answer = of_checkpoint()
    assert answer["ui"]["text"][5:] == ["when used: image encoder custom, latent encoder custom"]
    encoder, latents = answer["result"][5:]
    assert len(read) == 5 and (encoder.stage, latents.stage) == ("image_encoder", "latent_encoder")
    pictures = noise(1, 3, 30, 40)
    (placed,) = runtime.placed([encoder])
    assert torch.equal(encode_pictures(placed, pictures), encode_pictures(load("CascadeLoadImageEncoder"), pictures))
    assert encoder.title == "image encoder custom (c+.safetensors)" and encoder.module is encoder.module
    assert read[5:] == ["image_encoder", "image_encoder"]  # once by use, once by the other loader
    assert latents.module.mapper is not None and read[7:] == ["latent_encoder"]


def test_a_file_without_encoders_serves_those_who_need_none(combined_host):
    answer = of_checkpoint("c.safetensors")
    assert answer["ui"]["text"][5:] == ["not in these files: image encoder, latent encoder"]
    assert answer["result"][0].stage == "stage_c"
    for handle in answer["result"][5:]:
        what = handle.stage.replace("_", " ")
        with pytest.raises(ValueError, match=rf"^c.safetensors holds no {what}, .* connect 'Cascade: load {what}'"):
            runtime.placed([handle])


def test_auto_gives_the_encoders_of_the_file_that_it_takes(combined_host):
    (combined_host / "checkpoints/c.safetensors").unlink()
    everything = run("CascadeLoadCheckpoint", stage_c_file="auto", stage_b_file="auto")["result"]
    assert [handle.name[0] for handle in everything] == ["c", "c", "b", "b", "c", "c", "c"]


def test_the_bundled_family_has_both(host):
    answer = run("CascadeLoadCheckpoint", stage_c_file="tiny (bundled)", stage_b_file="tiny (bundled)")
    encoder, latents = answer["result"][5:]
    assert (encoder.title, latents.title) == ("image encoder tiny (bundled)", "latent encoder tiny (bundled)")
    assert answer["ui"]["text"][5:] == ["when used: image encoder tiny, latent encoder tiny"]


def test_a_stage_on_demand_is_a_handle_like_any_other(handles):
    asked = []
    stage = StageOnDemand("previewer", lambda: asked.append(1) or handles["previewer"])
    assert stage.expect("previewer") is stage and stage.attached == () and not asked
    with pytest.raises(ValueError, match="was given where a Stage C is read"):
        StageOnDemand("previewer", lambda: handles["previewer"]).expect("stage_c")
    other = replace(stage, name="other")
    assert isinstance(other, StageHandle) and other.title == "previewer custom (other)"
    assert other.module is stage.module is handles["previewer"].module and asked == [1]
    assert not hasattr(stage, "no_such_thing") and stage.to("cpu") is stage
