"""LoRA files as every trainer writes them, with the names and shapes of the published models; and files of others.

The names are put together here from the published ones, by the rules that the trainers' files follow. Weights stay
without memory: what is tested is which change goes where.
"""

import itertools

import pytest
import torch
from lora_kit import handle_of
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora
from stable_cascade_nodes.cascade_ops.adapters.lora import apply_lora
from stable_cascade_nodes.cascade_ops.checkpoints.loading import ParametersWithoutMemory
from stable_cascade_nodes.cascade_ops.models import StageC

LITE = {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]}
PARTS = ("to_q", "to_k", "to_v", "out_proj")


@pytest.fixture(scope="module", params=["full", "lite"])
def stage_c(request):
    with ParametersWithoutMemory():
        return handle_of(StageC(**(LITE if request.param == "lite" else {})))


@pytest.fixture(scope="module")
def text_encoder():
    config = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config)


def attention_of(stage_c):
    """The attention layers in order: down level 0, down level 1, up level 0 (the deep one), up level 1."""
    few, many = (8, 24) if len(stage_c.module.down_blocks[0]) == 24 else (4, 12)
    counts = (("down_blocks.0", few), ("down_blocks.1", many), ("up_blocks.0", many), ("up_blocks.1", few))
    return [f"{level}.{3 * i + 2}.attention" for level, count in counts for i in range(count)]


def width_of(stage_c):
    return stage_c.module.embedding[1].out_channels


# Dialect -> what stands before a layer's name, how attention's four parts are called, whether points are underscores.
_SPLIT, _OLD = [f"attn.{part}" for part in PARTS], [*(f"attn.{part}" for part in PARTS[:3]), "attn.to_out_proj"]
_NUMBERED = [*(f"attn.in_proj.{i}" for i in range(3)), "attn.out_proj"]
_DIFFUSERS = ["to_q", "to_k", "to_v", "to_out.0"]
VINTAGES = {
    "OneTrainer": ("lora_prior_unet_", _SPLIT, True),
    "OneTrainer before 3 March 2024": ("lora_prior_prior_", _SPLIT, True),
    "OneTrainer before 23 February 2024": ("lora_prior_prior_", _OLD, True),
    "OneTrainer KOHYA": ("lora_unet_", _NUMBERED, True),
    "OneTrainer DIFFUSERS": ("prior.", _DIFFUSERS, False),
    "OneTrainer ORIGINAL": ("", _NUMBERED, False),
    "OneTrainer COMFY": ("diffusion_model.", _NUMBERED, False),
    "kohya": ("lora_unet_", _SPLIT, True),
    "ComfyUI": ("diffusion_model.", _SPLIT, False),
    "diffusers": ("unet.", _DIFFUSERS, False),
    "PEFT": ("base_model.model.", _DIFFUSERS, False),
}
KOHYA_LEAVES = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT_LEAVES = ("lora_A.weight", "lora_B.weight", None)


def module(prefix, layer, shape, underscores, mark=1.0, rank=1):
    """The tensors of one layer; `mark` is in all of `down`."""
    stem = prefix + (layer.replace(".", "_") if underscores else layer)
    kernel = shape[2:]
    down, up, alpha = KOHYA_LEAVES if underscores else PEFT_LEAVES
    tensors = {
        f"{stem}.{down}": torch.full((rank, *shape[1:]), mark),
        f"{stem}.{up}": torch.ones(shape[0], rank, *(1,) * len(kernel)),
    }
    return tensors | ({f"{stem}.{alpha}": torch.tensor(0.5)} if alpha else {})


@pytest.mark.parametrize("vintage", VINTAGES)
def test_attention_of_the_published_models(stage_c, vintage, tmp_path):
    prefix, parts, underscores = VINTAGES[vintage]
    layers, width = attention_of(stage_c), width_of(stage_c)
    tensors, marks = {}, {}
    for number, (layer, place) in enumerate(itertools.product(layers, range(4))):
        tensors |= module(prefix, f"{layer}.{parts[place]}", (width, width), underscores, mark=float(number))
        marks[f"{layer}.attn.{PARTS[place]}.weight"] = float(number)
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    _, report = apply_lora(stage_c, lora)
    assert set(report.matched) == set(marks) and not report.unmatched and not report.unread and not report.skipped
    assert {name: change.down[0, 0].item() for name, change in lora.weights.items()} == marks
    assert {change.alpha for change in lora.weights.values()} == {0.5 if underscores else 1.0}


@pytest.mark.parametrize("vintage", ["kohya", "OneTrainer", "OneTrainer ORIGINAL", "ComfyUI"])
def test_every_other_layer_of_the_published_models(stage_c, vintage, tmp_path):
    """Linear and conv layers of all kinds, as trainers that are told to train everything write them."""
    prefix, _, underscores = VINTAGES[vintage]
    layers = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in stage_c.module.named_parameters()
        if name.endswith(".weight") and ".attention." not in name and parameter.ndim > 1
    }
    assert {len(shape) for shape in layers.values()} == {2, 4} and len(layers) > 200
    tensors = {}
    for layer, shape in layers.items():
        tensors |= module(prefix, layer, shape, underscores)
    save_file(tensors, tmp_path / "a.safetensors")
    _, report = apply_lora(stage_c, read_lora(tmp_path / "a.safetensors"))
    assert set(report.matched) == {f"{layer}.weight" for layer in layers} and not report.unmatched and not report.unread


def reference_file(path, pairs, tokens=None):
    """`pairs`: shape `[out, in]` of each module in the order of training; the number of each is in its `down`."""
    tensors = {}
    for i, (rows, columns) in enumerate(pairs):
        tensors[f"weights.{i}.lora_down"] = torch.full((4, columns), float(i))
        tensors[f"weights.{i}.lora_up"] = torch.zeros(rows, 4)
    if tokens:
        tensors["embeddings.embeddings"] = torch.zeros(len(tokens), 1280)
        tensors["embeddings.indices"] = torch.tensor(tokens)
    save_file(tensors, path)
    return path


def found_order(lora):
    return sorted(lora.weights, key=lambda name: lora.weights[name].down.flatten()[0].item())


def test_the_reference_by_position(stage_c, tmp_path):
    """Even numbers are attention's output, odd ones its fused input, level after level; alpha is 1 for rank 4."""
    width, layers = width_of(stage_c), attention_of(stage_c)
    path = tmp_path / "lora_fernando_10k.safetensors"
    lora = read_lora(
        reference_file(path, [(width, width), (3 * width, width)] * len(layers), [49408]),
        stage_c.module,
        tokens=[("[fernando]", "^dog</w>")],
    )
    parts = ("attn.out_proj.weight", "attn.in_proj_weight")
    assert found_order(lora) == [f"{layer}.{part}" for layer in layers for part in parts]
    _, report = apply_lora(stage_c, lora)
    assert len(report.matched) == 2 * len(layers) and not report.unmatched and not report.unread
    assert {change.scale for change in lora.weights.values()} == {0.25}
    assert [(token.token, token.init, token.row) for token in lora.tokens] == [("[fernando]", "^dog</w>", 49408)]


def test_the_reference_with_other_filters(stage_c, tmp_path):
    """Depthwise kernels count by channels alone; the order is the one in which the model's modules stand."""
    width = width_of(stage_c)
    blocks = [layer.removesuffix(".attention") for layer in attention_of(stage_c)]
    filters = ["kv_mapper", "depthwise"]
    expected, pairs = [], []
    for block in blocks:
        level, number = block.rsplit(".", 1)
        expected += [f"{level}.{int(number) - 2}.depthwise.weight", f"{block}.kv_mapper.1.weight"]
        c_cond = stage_c.module.clip_txt_mapper.out_features
        pairs += [(width, 1), (width, c_cond)]
    lora = read_lora(reference_file(tmp_path / "a.safetensors", pairs), stage_c.module, modules=filters)
    assert found_order(lora) == expected
    assert lora.weights[expected[0]].shape == (width, 1, 3, 3)
    with pytest.raises(ValueError, match="use the base model that it was trained on, and say with which module"):
        read_lora(reference_file(tmp_path / "a.safetensors", pairs[:-1]), stage_c.module, modules=filters)


def test_a_reference_file_of_the_other_size_is_refused(tmp_path):
    with ParametersWithoutMemory():
        lite = StageC(**LITE)
    path = reference_file(tmp_path / "full.safetensors", [(2048, 2048), (6144, 2048)] * 64)
    with pytest.raises(ValueError, match=r"its 128 changes do not fit this Stage C .which has 64 for '.attn'"):
        read_lora(path, lite)


TEXT_PREFIXES = {"lora_prior_te_": True, "lora_te_": True, "text_encoder.": False}


@pytest.mark.parametrize("prefix", TEXT_PREFIXES)
def test_the_published_text_encoder(text_encoder, prefix, tmp_path):
    underscores = TEXT_PREFIXES[prefix]
    layers = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in text_encoder.named_parameters()
        if name.endswith(".weight") and parameter.ndim == 2 and "embedding" not in name
    }
    assert len(layers) == 32 * 6 + 1 and layers["text_projection"] == (1280, 1280)
    tensors = {}
    for layer, shape in layers.items():
        tensors |= module(prefix, layer, shape, underscores)
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert not lora.unread and lora.stages == {"text_encoder"}
    assert {name: change.shape for name, change in lora.weights.items()} == {
        f"{layer}.weight": shape for layer, shape in layers.items()
    }


def test_onetrainers_own_words(stage_c, tmp_path):
    """Those that act behind the text encoder are counted apart: nothing here can use them."""
    width, layer = width_of(stage_c), attention_of(stage_c)[0]
    tensors = module("lora_prior_unet_", f"{layer}.attn.to_q", (width, width), True)
    tensors |= {
        "bundle_emb.fernando.clip_g": torch.ones(2, 1280),
        "bundle_emb.fernando.clip_g_out": torch.ones(2, 1280),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    (token,) = lora.tokens
    assert token.token == "<fernando>" and token.vectors.shape == (2, 1280)
    said = apply_lora(stage_c, lora)[1].describe()
    assert "1 of 1 changes applied; 1 learned words act behind the text encoder and are not used" in said
    (renamed,) = read_lora(tmp_path / "a.safetensors", tokens=[("[him]", "")]).tokens
    assert renamed.token == "[him]" and torch.equal(renamed.vectors, token.vectors)


STRANGERS = {
    "Stable Diffusion XL": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q lora_te1_text_model_encoder_"
    "layers_0_mlp_fc1 lora_te2_text_model_encoder_layers_0_mlp_fc1",
    "Stable Diffusion XL ": "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q",
    "Stable Diffusion 1 or 2": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k "
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "Stable Diffusion 3": "diffusion_model.joint_blocks.0.x_block.attn.qkv",
    "Flux": "lora_unet_double_blocks_0_img_attn_qkv",
    "Flux ": "transformer.single_transformer_blocks.0.attn.to_q",
    "Würstchen 2": "lora_prior_unet_blocks_2_attention_to_q",
    "Stable Diffusion 3 or Flux": "transformer.transformer_blocks.3.attn.to_q",
    "Stage B of Stable Cascade": "lora_unet_down_blocks_2_2_attention_attn_to_q lora_unet_effnet_mapper_0",
    "Stage B of Stable Cascade ": "up_blocks.3.2.channelwise.0 up_blocks.2.5.attention.attn.out_proj",
}


@pytest.mark.parametrize("title", STRANGERS)
def test_a_lora_of_another_model_is_named(title, tmp_path):
    tensors = {}
    for stem in STRANGERS[title].split():
        tensors |= {f"{stem}.lora_down.weight": torch.zeros(2, 8), f"{stem}.lora_up.weight": torch.zeros(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors is a LoRA of {title.strip()}, expected one of Stable Cascade"):
        read_lora(tmp_path / "a.safetensors")


def test_a_model_is_named(more_models):
    from stable_cascade_nodes.cascade_ops.model_folders import MODEL_FOLDERS

    assert "loras" in MODEL_FOLDERS
    for file, title in (("diffusion_models/c", "Stage C custom"), ("controlnet/ca", "ControlNet custom")):
        with pytest.raises(ValueError, match=f"is the model {title}, expected a LoRA of Stable Cascade"):
            read_lora(more_models / f"{file}.safetensors")


@pytest.mark.parametrize("leaf", ["oft_blocks", "oft_R.weight", "oft_diag"])
def test_oft_is_named(leaf, tmp_path):
    stem = "lora_prior_unet_down_blocks_0_2_attention_attn_to_q"
    save_file({f"{stem}.{leaf}": torch.zeros(4, 2, 2), f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"holds OFT .*it turns or multiplies weights where a LoRA adds to them"):
        read_lora(tmp_path / "a.safetensors")


def test_a_stage_c_of_more_levels_is_no_stage_b(tmp_path):
    tensors = {}
    for level in range(3):
        tensors |= module("lora_unet_", f"down_blocks.{level}.2.attention.attn.to_q", (8, 8), True)
    save_file(tensors, tmp_path / "a.safetensors")
    assert len(read_lora(tmp_path / "a.safetensors").weights) == 3
