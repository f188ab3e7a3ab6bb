"""Checkpoints of every layout load to the model that made the golden outputs, and are written back."""

import json
import math
import os
import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stable_cascade_nodes.cascade_ops.checkpoints import CheckpointError, inspect_file, load, save
from stable_cascade_nodes.cascade_ops.checkpoints.loading import ParametersWithoutMemory
from stable_cascade_nodes.cascade_ops.models import ControlNet, LatentEncoder, Previewer, StageA, StageC

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
fill_state_dict = runpy.run_path(str(DATA / "fill.py"))["fill_state_dict"]


def golden(name):
    """The stored inputs and outputs, the configuration and the filled weights of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    shapes = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    return load_file(GOLDEN / f"{name}.safetensors"), config, fill_state_dict(shapes)


def metadata(stage, config, **more):
    return {"cascade.stage": stage, "cascade.config": json.dumps(config), **more}


def split_attention(tensors, between):
    """Fused q/k/v to three tensors: `attention` + between + `to_q` ..., as diffusers and ComfyUI store them."""
    out = {}
    for name, tensor in tensors.items():
        if "attention.attn.in_proj_" in name:
            block, leaf = name.split(".attn.in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{block}{between}to_{letter}.{leaf}"] = third.clone()
        else:
            out[name] = tensor
    return out


def to_diffusers(tensors):
    renamed = {}
    for name, tensor in split_attention(tensors, ".").items():
        name = name.replace(".attention.attn.out_proj.", ".attention.to_out.0.")
        renamed[name.replace("clip_mapper.", "clip_txt_pooled_mapper.", name.startswith("clip_mapper."))] = tensor
    return renamed


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


LAYOUTS = {
    "original": lambda tensors: tensors,
    "wrapped": lambda tensors: prefixed(tensors, "state_dict.module."),
    "diffusers": to_diffusers,
    "comfyui": lambda tensors: prefixed(tensors, "model.diffusion_model."),
    "comfyui split": lambda tensors: prefixed(split_attention(tensors, ".attn."), "model.diffusion_model."),
}


def assert_golden(output, expected):
    assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["stage_c_two_level", "stage_c_switch_level"])
def test_stage_c_of_every_layout(tmp_path, layout, name):
    data, config, weights = golden(name)
    file = tmp_path / "c.safetensors"
    save_file(LAYOUTS[layout](weights), file, metadata("stage_c", config))
    model, info = load(file, "stage_c")
    assert isinstance(model, StageC) and not model.training
    assert info.config == config | {"dropout": info.config["dropout"]}
    output = model(data["x"], data["r"], data["clip_text"], data["clip_text_pooled"], data["clip_img"])
    assert_golden(output, data["output"])


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_b_of_every_layout(tmp_path, layout):
    data, config, weights = golden("stage_b")
    file = tmp_path / "b.safetensors"
    save_file(LAYOUTS[layout](weights), file, metadata("stage_b", config))
    model, _ = load(file)
    assert_golden(model(data["x"], data["r"], data["effnet"], data["clip"]), data["output"])


@torch.no_grad()
def test_sharded_diffusers_folder(tmp_path):
    data, _, weights = golden("stage_b")
    weights = to_diffusers(weights)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = {"_class_name": "StableCascadeUNet", "num_attention_heads": [0, 0, 4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = load(tmp_path, "stage_b")
    assert info.layout == "diffusers"
    assert_golden(model(data["x"], data["r"], data["effnet"], data["clip"]), data["output"])


@torch.no_grad()
def test_stage_a_and_the_scale_of_its_layout(tmp_path):
    data, _, weights = golden("stage_a")
    save_file(weights, tmp_path / "a.safetensors")
    original, _ = load(tmp_path / "a.safetensors", "stage_a")
    assert isinstance(original, StageA)
    assert_golden(original.encode(data["image"])[0], data["latent"])
    assert_golden(original.decode(data["latent"]), data["decoded"])
    renamed = {name.replace("codebook", "embedding"): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "vqgan.safetensors")
    diffusers, _ = load(tmp_path / "vqgan.safetensors", "stage_a")
    # The same network with another unit: latents are longer by the ratio of the two factors.
    assert_golden(diffusers.encode(data["image"])[0], data["latent"] * (0.43 / 0.3764))
    assert_golden(diffusers.decode(data["latent"] * (0.43 / 0.3764)), data["decoded"])


@torch.no_grad()
def test_small_models(tmp_path):
    data, _, weights = golden("controlnet_simple")
    save_file(weights, tmp_path / "n.safetensors")
    control, _ = load(tmp_path / "n.safetensors", "controlnet")
    assert isinstance(control, ControlNet)
    assert_golden(control(data["input"])[9], data["residual.9"])
    shapes = json.loads((DATA / "manifests/previewer.json").read_text())
    save_file(fill_state_dict(shapes), tmp_path / "p.safetensors")
    previewer, _ = load(tmp_path / "p.safetensors", "previewer")
    data = load_file(GOLDEN / "previewer.safetensors")
    assert_golden(previewer(data["latent"]), data["image"])


def clip_shapes(tower, width, layers, projection, **embeddings):
    """The published names and shapes of a CLIP text or image encoder, under transformers' names."""
    shapes = {f"{tower}.embeddings.{name}": shape for name, shape in embeddings.items()}
    for layer in range(layers):
        block = f"{tower}.encoder.layers.{layer}"
        linear = {f"self_attn.{letter}_proj": (width, width) for letter in ("k", "v", "q", "out")}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, (rows, columns) in linear.items():
            shapes |= {f"{block}.{name}.weight": [rows, columns], f"{block}.{name}.bias": [rows]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}.{norm}.weight": [width], f"{block}.{norm}.bias": [width]}
    norms = ("final_layer_norm",) if tower == "text_model" else ("pre_layrnorm", "post_layernorm")
    for norm in norms:
        shapes |= {f"{tower}.{norm}.weight": [width], f"{tower}.{norm}.bias": [width]}
    name = "text_projection" if tower == "text_model" else "visual_projection"
    return shapes | {f"{name}.weight": [projection, width]}


def text_weights():
    embeddings = {"token_embedding.weight": [49408, 64], "position_embedding.weight": [77, 64]}
    return fill_state_dict(clip_shapes("text_model", 64, 1, 48, **embeddings))


def image_weights():
    embeddings = {
        "class_embedding": [64],
        "patch_embedding.weight": [64, 3, 14, 14],
        "position_embedding.weight": [5, 64],
    }
    return fill_state_dict(clip_shapes("vision_model", 64, 1, 32, **embeddings))


@torch.no_grad()
def test_comfyui_combined_checkpoint(tmp_path):
    data, config, stage_c = golden("stage_c_two_level")
    text, image = text_weights(), image_weights()
    shapes = json.loads((DATA / "manifests/previewer.json").read_text())
    previewer = fill_state_dict({name: [max(size // 4, 3) if size >= 64 else size for size in shape]
                                 for name, shape in shapes.items()})  # fmt: skip
    stored = prefixed(split_attention(stage_c, ".attn."), "model.diffusion_model.")
    stored |= prefixed(text, "text_encoder.clip_g.transformer.")
    projection = stored.pop("text_encoder.clip_g.transformer.text_projection.weight")
    stored["text_encoder.clip_g.text_projection"] = projection.t().contiguous()
    stored["text_encoder.clip_g.logit_scale"] = torch.tensor(4.6)
    stored |= prefixed(image, "clip_l_vision.") | prefixed(previewer, "vae.previewer.")
    file = tmp_path / "combined.safetensors"
    save_file(stored, file, metadata("stage_c", config))

    model, info = load(file, "stage_c")
    assert info.layout == "comfyui split q/k/v"
    output = model(data["x"], data["r"], data["clip_text"], data["clip_text_pooled"], data["clip_img"])
    assert_golden(output, data["output"])
    encoder, info = load(file, "text_encoder")
    loaded = encoder.module.state_dict()
    assert set(loaded) == set(text) and all(torch.equal(loaded[name], text[name]) for name in text)
    assert info.config["num_attention_heads"] == 1
    vision, _ = load(file, "image_encoder")
    loaded = vision.state_dict()
    assert set(loaded) == set(image) and all(torch.equal(loaded[name], image[name]) for name in image)
    assert vision(torch.zeros(2, 3, 28, 28)).image_embeds.shape == (2, 32)
    small, _ = load(file, "previewer")
    assert isinstance(small, Previewer) and small(torch.zeros(1, 16, 2, 3)).shape == (1, 3, 16, 24)
    with pytest.raises(CheckpointError, match=r"combined checkpoint of stage_c, text_encoder, .*say which one"):
        load(file)


def test_projection_stored_the_modern_way(tmp_path):
    text = text_weights()
    save_file(text | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "t.safetensors")
    encoder, _ = load(tmp_path / "t.safetensors", "text_encoder")
    assert torch.equal(encoder.module.text_projection.weight, text["text_projection.weight"])
    save_file({name: tensor for name, tensor in text.items() if "fc2" not in name}, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=r"^t.safetensors: The text encoder lacks the tensor .*fc2"):
        load(tmp_path / "t.safetensors")


def test_clip_encoders_as_the_tiny_family_stores_them(tmp_path):
    text, image = text_weights(), image_weights()
    rows = torch.tensor([0, 320, 49406, 49407])
    table = "text_model.embeddings.token_embedding.weight"
    save_file(text | {table: text[table][rows], "token_rows": rows}, tmp_path / "t.safetensors")
    encoder, info = load(tmp_path / "t.safetensors", "text_encoder")
    assert torch.equal(encoder.module.text_model.embeddings.token_embedding.weight[rows], text[table][rows])
    stored = {name: tensor for name, tensor in text.items() if name != table}
    assert info.parameters == sum(tensor.numel() for tensor in stored.values()) + 4 * 64
    assert info.config["vocab_size"] == 49408
    extra = {"text_to_image_projection.weight": torch.zeros(32, 48)}
    save_file(image | extra, tmp_path / "i.safetensors")
    vision, _ = load(tmp_path / "i.safetensors", "image_encoder")
    assert set(vision.state_dict()) == set(image)


def test_latent_encoder_of_a_combined_file(tmp_path):
    widths = [8, 8, 16, 16, 32, 40, 64, 96]
    shapes = {name: tuple(tensor.shape) for name, tensor in LatentEncoder(widths=widths).state_dict().items()}
    weights = fill_state_dict(shapes)
    statistics = {"vae.encoder.mean": torch.zeros(3), "vae.encoder.std": torch.ones(3)}
    stored = prefixed(weights, "vae.encoder.") | statistics
    save_file({name: tensor.half() for name, tensor in stored.items()}, tmp_path / "e.safetensors")
    encoder, info = load(tmp_path / "e.safetensors", "latent_encoder", dtype=torch.float32)
    loaded = encoder.state_dict()
    assert info.config["widths"] == widths
    assert loaded["mapper.1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(loaded[name], weights[name].half().to(loaded[name].dtype)) for name in weights)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_types(tmp_path, stored, asked):
    _, config, weights = golden("stage_c_two_level")
    save_file(
        {name: tensor.to(stored) for name, tensor in weights.items()},
        tmp_path / "c.safetensors",
        metadata("stage_c", config),
    )
    model, info = load(tmp_path / "c.safetensors", dtype=asked)
    name = "down_blocks.0.2.attention.attn.in_proj_weight"
    assert model.state_dict()[name].dtype == (asked or stored)
    assert torch.equal(model.state_dict()[name], weights[name].to(stored).to(asked or stored))
    assert info.dtypes == ({torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[stored],)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_eight_bit_floats_become_bfloat16(tmp_path):
    weights = fill_state_dict(json.loads((GOLDEN / "stage_a.keys.json").read_text()))
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        eight = {name: tensor.to(kind) if tensor.ndim > 1 else tensor for name, tensor in weights.items()}
        save_file(eight, tmp_path / "a.safetensors")
        model, info = load(tmp_path / "a.safetensors")
        assert info.dtypes[0] == "fp8"
        assert torch.equal(model.state_dict()["in_block.1.weight"], eight["in_block.1.weight"].to(torch.bfloat16))


def test_models_are_built_without_memory_for_their_weights():
    with ParametersWithoutMemory():
        model = StageA(c_hidden=64, bottleneck_blocks=1)
        constant = torch.arange(3) * 2
    large = [name for name, tensor in model.state_dict().items() if tensor.numel() > 1000 and not tensor.is_meta]
    assert large == [] and constant.tolist() == [0, 2, 4]
    assert torch.empty(1).device.type == "cpu"


def test_weights_are_the_models_own(tmp_path):
    _, config, weights = golden("stage_c_two_level")
    file = tmp_path / "c.safetensors"
    save_file(weights, file, metadata("stage_c", config))
    model, _ = load(file)
    with file.open("r+b") as handle:  # what would end the process if the weights were a mapping of the file
        handle.truncate(100)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    addresses = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert len(addresses) == len(weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("clf.1.bias"), r"lacks the tensor 'clf.1.bias' \(1 of the 214 expected"),
        (lambda w: w.pop("clip_img_mapper.weight"), "no tensor 'clip_img_mapper.weight', which every model"),
        (
            lambda w: w.update(extra=torch.zeros(2)),
            "holds the tensor 'extra' .1 in all. that the model has no place for",
        ),
        (
            lambda w: w.update({"clf.1.bias": torch.zeros(5)}),
            r"'clf.1.bias' with shape \[5\], expected \[16\] \(1 of 214",
        ),
        (
            lambda w: w.update({"down_blocks.1.5.attention.attn.in_proj_weight": torch.zeros(190, 64)}),
            r"in_proj_weight' with shape \[190, 64\], expected \[192, 64\]",
        ),
    ],
    ids=["missing", "missing for the configuration", "unknown", "one shape", "attention"],
)
def test_tensors_that_do_not_fit(tmp_path, change, words):
    _, config, weights = golden("stage_c_two_level")
    change(weights)
    save_file(weights, tmp_path / "c.safetensors", metadata("stage_c", config))
    with pytest.raises(CheckpointError, match=words) as caught:
        load(tmp_path / "c.safetensors")
    assert "\n" not in str(caught.value)


def test_a_third_of_split_attention_missing(tmp_path):
    _, config, weights = golden("stage_c_two_level")
    weights = to_diffusers(weights)
    del weights["up_blocks.0.2.attention.to_k.weight"]
    save_file(weights, tmp_path / "c.safetensors", metadata("stage_c", config))
    with pytest.raises(CheckpointError, match=r"'up_blocks.0.2.attention.attn.in_proj_weight' with shape \[128, 64\]"):
        load(tmp_path / "c.safetensors")


def test_wrong_stage(tmp_path):
    _, config, weights = golden("stage_b")
    save_file(weights, tmp_path / "b.safetensors", metadata("stage_b", config, **{"cascade.name": "tiny"}))
    with pytest.raises(CheckpointError, match=r"^b.safetensors holds Stage B tiny, expected Stage C: choose another"):
        load(tmp_path / "b.safetensors", "stage_c")
    with pytest.raises(ValueError, match=r"'stage_d' was asked for, expected one of stage_a"):
        load(tmp_path / "b.safetensors", "stage_d")
    save_file({"weights.0.lora_down": torch.zeros(1)}, tmp_path / "l.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is a LoRA, expected a Stable Cascade model: load it with a LoRA loader"
    ):
        load(tmp_path / "l.safetensors")


def test_what_cannot_be_known_is_refused(tmp_path):
    _, config, weights = golden("stage_b")
    file = tmp_path / "b.safetensors"
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"does not say nhead.*cascade.config"):
        load(file)
    save_file(weights, file, metadata("stage_b", config | {"colour": "red"}))
    with pytest.raises(CheckpointError, match=r"cannot be built .*colour.*correct or remove 'cascade.config'"):
        load(file)
    save_file(weights, file, {"cascade.stage": "stage_b", "cascade.config": "[1"})
    with pytest.raises(CheckpointError, match=r"'cascade.config' '.1', expected a JSON object"):
        load(file)
    stray = prefixed(weights, "model.diffusion_model.") | {"model_ema.decay": torch.zeros(1)}
    save_file(stray, file, metadata("stage_b", config))
    with pytest.raises(CheckpointError, match=r"holds the tensor 'model_ema.decay' .1 in all. that the model has no"):
        load(file)


@torch.no_grad()
def test_save_and_load(tmp_path):
    data, config, weights = golden("stage_c_switch_level")
    model = StageC(**config)
    model.load_state_dict(weights)
    defaults = {"width": 256, "height": 256, "guidance": 1.5, "steps": 20, "shift": 2.0}
    file = save(
        model, tmp_path / "new/c.safetensors", stage="stage_c", config=config, defaults=defaults, name="tiny"
    )  # fmt: skip
    with safe_open(file, "pt") as stored:  # the reference implementation reads it
        assert json.loads(stored.metadata()["cascade.config"]) == config
        assert all(torch.equal(stored.get_tensor(name), weights[name]) for name in weights)
        assert set(stored.keys()) == set(weights)
    loaded, info = load(file, "stage_c")
    assert (info.size, info.layout, info.config, info.defaults) == ("tiny", "original", config, defaults)
    output = loaded(data["x"], data["r"], data["clip_text"], data["clip_text_pooled"], data["clip_img"])
    assert_golden(output, data["output"])
    assert os.listdir(file.parent) == ["c.safetensors"]


def test_save_with_a_cast(tmp_path):
    _, config, weights = golden("stage_a")
    file = save(weights, tmp_path / "a.safetensors", stage="stage_a", config=config, dtype=torch.float16)
    stored = load_file(file)
    assert stored["down_blocks.3.1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(stored["in_block.1.weight"], weights["in_block.1.weight"].half())
    assert inspect_file(file).dtypes == ("fp16",)
    size = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in stored.values())
    assert file.stat().st_size == size + 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_save_refuses_what_it_was_not_told(tmp_path):
    _, config, weights = golden("stage_a")
    file = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"are those of a Stage A in the layout 'original', expected .* Stage C"):
        save(weights, file, stage="stage_c", config=config)
    with pytest.raises(CheckpointError, match=r"with the prefix 'module.'"):
        save(prefixed(weights, "module."), file, stage="stage_a", config=config)
    with pytest.raises(CheckpointError, match=r"'combined' is not one that is saved"):
        save(weights, file, stage="combined", config=config)
    assert not file.exists()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    _, config, weights = golden("stage_a")
    file = save(weights, tmp_path / "a.safetensors", stage="stage_a", config=config)
    before = file.read_bytes()
    broken = dict(weights) | {"out_block.0.bias": torch.empty(12, device="meta")}
    with pytest.raises(NotImplementedError):
        save(broken, file, stage="stage_a", config=config)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
