"""What a checkpoint is, told from its header: every published file, every layout, every kind of wrong file."""

import json
import math
from pathlib import Path

import pytest
import torch

from stable_cascade_nodes.cascade_ops.checkpoints import CheckpointError, inspect_file

DATA = Path(__file__).parent / "data"
MANIFESTS = {file.stem: json.loads(file.read_text()) for file in sorted((DATA / "manifests").glob("*.json"))}
GOLDEN_KEYS = {
    file.name.removesuffix(".keys.json"): json.loads(file.read_text())
    for file in sorted((DATA / "golden").glob("*.keys.json"))
}


def header_only(path, shapes, dtype="F32", metadata=None):
    """Write a safetensors file whose tensors are holes: full size for `stat`, next to nothing on the disk."""
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        kind = "I64" if name.endswith("num_batches_tracked") else dtype
        size = math.prod(shape) * {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8}[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def prefixed(shapes, prefix):
    return {prefix + name: shape for name, shape in shapes.items()}


def to_diffusers(shapes):
    """The names that diffusers gives the tensors of Stage B or C."""
    out = {}
    for name, shape in shapes.items():
        name = name.replace("attention.attn.out_proj.", "attention.to_out.0.")
        if name.startswith("clip_mapper."):
            name = "clip_txt_pooled_mapper." + name.removeprefix("clip_mapper.")
        if "attention.attn.in_proj_" in name:
            for letter in "qkv":
                out[name.replace("attn.in_proj_", f"to_{letter}.")] = [shape[0] // 3, *shape[1:]]
        else:
            out[name] = shape
    return out


def clip_text(width=64, layers=2, vocabulary=49408, projection=48):
    shapes = {
        "text_model.embeddings.token_embedding.weight": [vocabulary, width],
        "text_model.embeddings.position_embedding.weight": [77, width],
        "text_projection.weight": [projection, width],
    }
    for layer in range(layers):
        shapes[f"text_model.encoder.layers.{layer}.mlp.fc1.weight"] = [4 * width, width]
    return shapes


def clip_image(width=64, layers=2, projection=32):
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": [width, 3, 14, 14],
        "vision_model.embeddings.position_embedding.weight": [257, width],
        "visual_projection.weight": [projection, width],
    }
    for layer in range(layers):
        shapes[f"vision_model.encoder.layers.{layer}.mlp.fc1.weight"] = [4 * width, width]
    return shapes


PUBLISHED = {
    "stage_c_3.6b": ("stage_c", "3.6B", 3_589_103_632),
    "stage_c_1b_lite": ("stage_c", "1B lite", 1_030_785_040),
    "stage_b_1.5b": ("stage_b", "1.5B", 1_562_941_136),
    "stage_b_700m_lite": ("stage_b", "700M lite", 699_471_248),
    "stage_a": ("stage_a", "18M", 18_406_894),
    "effnet_encoder": ("latent_encoder", "20M", 20_197_968),
    "previewer": ("previewer", "4M", 3_979_651),
    "controlnet_canny": ("controlnet", "canny", 54_255_776),
    "controlnet_inpainting": ("controlnet", "inpainting", 54_256_424),
    "controlnet_super_resolution": ("controlnet", "super resolution", 203_491_584),
    "controlnet_face_identity": ("controlnet", "identity", 102_763_008),
}

# The published hyper-parameters, as in the configurations of the reference repository.
_STAGE_C = {
    "c_in": 16, "c_out": 16, "c_r": 64, "patch_size": 1, "block_repeat": [[1, 1], [1, 1]],
    "level_config": ["CTA", "CTA"], "c_clip_text": 1280, "c_clip_text_pooled": 1280, "c_clip_img": 768,
    "c_clip_seq": 4, "kernel_size": 3, "dropout": [0.1, 0.1], "self_attn": True, "t_conds": ["sca", "crp"],
    "switch_level": [False],
}  # fmt: skip
_STAGE_B = {
    "c_in": 4, "c_out": 4, "c_r": 64, "patch_size": 2, "c_cond": 1280, "level_config": ["CT", "CT", "CTA", "CTA"],
    "c_clip": 1280, "c_clip_seq": 4, "c_effnet": 16, "c_pixels": 3, "kernel_size": 3,
    "dropout": [0.0, 0.0, 0.1, 0.1], "self_attn": True, "t_conds": ["sca"],
}  # fmt: skip
_EFFICIENTNET = {"widths": [24, 24, 48, 64, 128, 160, 256, 1280], "depths": [2, 4, 4, 6, 9, 15]}
_STEERED = {"c_proj": 2048, "proj_blocks": [0, 4, 8, 12, 51, 55, 59, 63]}
HYPERPARAMETERS = {
    "stage_c_3.6b": _STAGE_C
    | {"c_cond": 2048, "c_hidden": [2048, 2048], "nhead": [32, 32], "blocks": [[8, 24], [24, 8]]},
    "stage_c_1b_lite": _STAGE_C
    | {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]},
    "stage_b_1.5b": _STAGE_B
    | {
        "c_hidden": [320, 640, 1280, 1280],
        "nhead": [-1, -1, 20, 20],
        "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]],
        "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
    },
    "stage_b_700m_lite": _STAGE_B
    | {
        "c_hidden": [320, 576, 1152, 1152],
        "nhead": [-1, 9, 18, 18],
        "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
        "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
    },
    "stage_a": {
        "levels": 2, "bottleneck_blocks": 12, "c_hidden": 384, "c_latent": 4, "codebook_size": 8192,
        "scale_factor": 0.43,
    },
    "effnet_encoder": {"c_latent": 16, **_EFFICIENTNET},
    "previewer": {"c_in": 16, "c_hidden": 512, "c_out": 3},
    "controlnet_canny": {"c_in": 1, "bottleneck_mode": "effnet", **_STEERED, **_EFFICIENTNET},
    "controlnet_inpainting": {"c_in": 4, "bottleneck_mode": "effnet", **_STEERED, **_EFFICIENTNET},
    "controlnet_super_resolution": {"c_in": 16, "bottleneck_mode": "large", **_STEERED},
    "controlnet_face_identity": {
        "c_in": 512, "bottleneck_mode": "simple", "c_proj": 2048, "proj_blocks": list(range(64)),
    },
}  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_published_files(tmp_path, manifest):
    info = inspect_file(header_only(tmp_path / "any_name.safetensors", MANIFESTS[manifest]))
    assert (info.stage, info.size, info.parameters) == PUBLISHED[manifest]
    assert info.config == HYPERPARAMETERS[manifest]
    assert (info.layout, info.dtypes, info.unknown, info.leftover) == ("original", ("fp32",), (), ())
    assert info.tensors == len(MANIFESTS[manifest])


def test_every_published_file_is_covered():
    assert set(MANIFESTS) == set(PUBLISHED) == set(HYPERPARAMETERS)


def test_defaults_of_the_release(tmp_path):
    stage_c = inspect_file(header_only(tmp_path / "c.safetensors", MANIFESTS["stage_c_3.6b"]))
    stage_b = inspect_file(header_only(tmp_path / "b.safetensors", MANIFESTS["stage_b_700m_lite"]))
    assert stage_c.defaults == {"width": 1024, "height": 1024, "guidance": 4.0, "steps": 20, "shift": 2.0}
    assert stage_b.defaults == {"guidance": 1.1, "steps": 10, "shift": 1.0}
    assert inspect_file(header_only(tmp_path / "a.safetensors", MANIFESTS["stage_a"])).defaults == {}


def test_preference_of_sizes(tmp_path):
    full = inspect_file(header_only(tmp_path / "full.safetensors", MANIFESTS["stage_c_3.6b"]))
    lite = inspect_file(header_only(tmp_path / "lite.safetensors", MANIFESTS["stage_c_1b_lite"]))
    custom = inspect_file(header_only(tmp_path / "custom.safetensors", GOLDEN_KEYS["stage_c_two_level"]))
    named = {"cascade.stage": "stage_c", "cascade.name": "tiny"}
    tiny = inspect_file(header_only(tmp_path / "t.safetensors", GOLDEN_KEYS["stage_c_two_level"], metadata=named))
    assert full.rank < lite.rank < custom.rank < tiny.rank
    assert (custom.size, tiny.size) == ("custom", "tiny")


def golden_config(name):
    with (DATA / "golden" / f"{name}.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["config"])


# What no shape tells, per golden model; heads of 64 are assumed where the width allows.
SILENT = {
    "stage_c_two_level": {"nhead", "dropout"},
    "stage_c_switch_level": {"nhead", "dropout", "self_attn", "switch_level"},
    "stage_b": {"nhead"},
    "stage_a": set(),
    "controlnet_effnet_c1": {"proj_blocks", "bottleneck_mode"},  # the golden file leaves the mode at its default
    "controlnet_large": {"proj_blocks"},
    "controlnet_simple": set(),
}


@pytest.mark.parametrize("name", GOLDEN_KEYS)
def test_golden_configurations(tmp_path, name):
    golden = golden_config(name)
    info = inspect_file(header_only(tmp_path / "x.safetensors", GOLDEN_KEYS[name]))
    told = {key: value for key, value in golden.items() if key not in SILENT[name]}
    assert {key: info.config.get(key) for key in told} == told
    said = {"cascade.stage": info.stage, "cascade.config": json.dumps(golden)}
    informed = inspect_file(header_only(tmp_path / "y.safetensors", GOLDEN_KEYS[name], metadata=said))
    assert {key: informed.config[key] for key in golden} == golden
    assert informed.unknown == ()


def test_what_nothing_says_is_listed(tmp_path):
    stage_b = inspect_file(header_only(tmp_path / "b.safetensors", GOLDEN_KEYS["stage_b"]))
    control = inspect_file(header_only(tmp_path / "n.safetensors", GOLDEN_KEYS["controlnet_large"]))
    assert (stage_b.unknown, control.unknown) == (("nhead",), ("proj_blocks",))
    assert "not known   nhead" in stage_b.describe()


def test_metadata_of_another_stage_is_not_taken(tmp_path):
    said = {"cascade.stage": "stage_b", "cascade.config": json.dumps({"c_hidden": [1]}), "cascade.name": "tiny"}
    info = inspect_file(header_only(tmp_path / "c.safetensors", MANIFESTS["stage_c_1b_lite"], metadata=said))
    assert (info.size, info.config["c_hidden"]) == ("1B lite", [1536, 1536])


@pytest.mark.parametrize(
    "manifest", ["stage_c_3.6b", "stage_c_1b_lite", "stage_b_1.5b", "stage_b_700m_lite"]
)  # fmt: skip
@pytest.mark.parametrize("layout", ["diffusers", "comfyui split q/k/v", "comfyui", "wrapped"])
def test_layouts_of_the_networks(tmp_path, manifest, layout):
    shapes = MANIFESTS[manifest]
    if layout == "diffusers":
        stored, prefix = to_diffusers(shapes), ""
    elif layout == "comfyui split q/k/v":
        stored = {}
        for name, shape in shapes.items():
            if "in_proj_" in name:
                stored |= {name.replace("in_proj_", f"to_{letter}."): [shape[0] // 3, *shape[1:]] for letter in "qkv"}
            else:
                stored[name] = shape
        stored, prefix = prefixed(stored, "model.diffusion_model."), "model.diffusion_model."
    else:
        prefix = "model.diffusion_model." if layout == "comfyui" else "state_dict.module."
        stored = prefixed(shapes, prefix)
    info = inspect_file(header_only(tmp_path / "x.safetensors", stored, "BF16"))
    assert (info.stage, info.size, info.parameters) == PUBLISHED[manifest]
    assert info.config == HYPERPARAMETERS[manifest]
    assert (info.layout, info.prefix) == ("original" if layout == "wrapped" else layout, prefix)
    assert info.dtypes == ("bf16",)
    assert {name: list(recipe.shape) for name, recipe in info.recipes.items()} == shapes


def test_stage_a_of_diffusers_has_its_own_scale(tmp_path):
    shapes = {name.replace("codebook", "embedding"): shape for name, shape in MANIFESTS["stage_a"].items()}
    lone = inspect_file(header_only(tmp_path / "vqgan.safetensors", shapes))
    assert (lone.stage, lone.layout, lone.size, lone.config["scale_factor"]) == ("stage_a", "diffusers", "18M", 0.3764)
    header_only(tmp_path / "vqgan/diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "vqgan/config.json").write_text(json.dumps({"_class_name": "PaellaVQModel", "scale_factor": 0.5}))
    assert inspect_file(tmp_path / "vqgan").config["scale_factor"] == 0.5


def test_diffusers_folder(tmp_path):
    folder = tmp_path / "decoder"
    file = header_only(folder / "diffusion_pytorch_model.safetensors", to_diffusers(GOLDEN_KEYS["stage_b"]))
    config = {"_class_name": "StableCascadeUNet", "num_attention_heads": [0, 0, 4, 4], "self_attn": True}
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, file):
        info = inspect_file(path)
        assert (info.stage, info.layout, info.config["nhead"]) == ("stage_b", "diffusers", [-1, -1, 4, 4])
        assert info.unknown == ()


def test_config_json_of_another_model_is_not_taken(tmp_path):
    file = header_only(tmp_path / "c.safetensors", MANIFESTS["stage_c_1b_lite"])
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", "nhead": [1, 1]}))
    assert inspect_file(file).config["nhead"] == [24, 24]


def test_sharded_model(tmp_path):
    shapes = to_diffusers(MANIFESTS["stage_c_3.6b"])
    names = list(shapes)
    halves = {"a-00001-of-00002.safetensors": names[:500], "a-00002-of-00002.safetensors": names[500:]}
    for file, part in halves.items():
        header_only(tmp_path / "prior" / file, {name: shapes[name] for name in part})
    index = tmp_path / "prior/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}}))
    for path in (index, tmp_path / "prior", tmp_path / "prior/a-00002-of-00002.safetensors"):
        info = inspect_file(path)
        assert (info.size, info.layout) == ("3.6B", "diffusers")
    (tmp_path / "prior/a-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a-00001-of-00002.safetensors' is not there \(1 missing\)"):
        inspect_file(tmp_path / "prior")


def test_combined_checkpoint(tmp_path):
    stored = prefixed(MANIFESTS["stage_c_3.6b"], "model.diffusion_model.")
    text = clip_text(1280, 32, projection=1280)
    del text["text_projection.weight"]
    stored |= prefixed(text, "text_encoder.clip_g.transformer.")
    stored |= {"text_encoder.clip_g.text_projection": [1280, 1280], "text_encoder.clip_g.logit_scale": []}
    stored |= prefixed(clip_image(1024, 24, 768), "clip_l_vision.")
    stored |= prefixed(MANIFESTS["effnet_encoder"], "vae.encoder.")
    stored |= prefixed(MANIFESTS["previewer"], "vae.previewer.")
    info = inspect_file(header_only(tmp_path / "comfy.safetensors", stored, "BF16"))
    assert (info.stage, info.layout, info.leftover) == ("combined", "comfyui combined", ())
    assert sorted(part.stage for part in info.components) == [
        "image_encoder", "latent_encoder", "previewer", "stage_c", "text_encoder",
    ]  # fmt: skip
    assert info.component("stage_c").size == "3.6B"
    assert info.component("latent_encoder").config == HYPERPARAMETERS["effnet_encoder"]
    assert info.component("text_encoder").config == {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280,
        "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu", "num_attention_heads": 20,
    }  # fmt: skip
    image = info.component("image_encoder").config
    assert (image["image_size"], image["hidden_act"], image["num_attention_heads"]) == (224, "quick_gelu", 16)
    assert "Stage C 3.6B" in info.describe() and "previewer 4M" in info.describe()
    assert json.loads(json.dumps(info.as_dict()))["components"][0]["stage"] == "stage_c"
    with pytest.raises(CheckpointError, match=r"is a combined checkpoint of Stage C 3.6B, .* expected Stage B"):
        info.component("stage_b")


def test_combined_checkpoint_of_stages_b_and_a(tmp_path):
    stored = prefixed(MANIFESTS["stage_b_1.5b"], "model.diffusion_model.") | prefixed(MANIFESTS["stage_a"], "vae.")
    info = inspect_file(header_only(tmp_path / "comfy.safetensors", stored, "BF16"))
    assert [part.size for part in info.components] == ["1.5B", "18M"]
    assert info.component("stage_a").config["scale_factor"] == 0.43


def test_whole_clip_model_and_transformers_folder(tmp_path):
    folder = tmp_path / "clip"
    header_only(folder / "model.safetensors", clip_text(48) | clip_image(40) | {"logit_scale": []})
    towers = {"text_config": {"num_attention_heads": 6}, "vision_config": {"num_attention_heads": 5}}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **towers}))
    info = inspect_file(folder)
    assert (info.layout, info.leftover) == ("transformers", ())
    assert info.component("text_encoder").config["num_attention_heads"] == 6
    assert info.component("image_encoder").config["num_attention_heads"] == 5
    text = inspect_file(header_only(tmp_path / "lone.safetensors", clip_text(48)))
    assert (text.stage, text.unknown) == ("text_encoder", ("num_attention_heads",))


@pytest.mark.parametrize(
    ("shapes", "stage", "word"),
    [
        ({"weights.0.lora_down": [4, 64], "weights.0.lora_up": [64, 4]}, "lora", "is a LoRA"),
        ({"diffusion_model.down_blocks.0.2.attention.attn.out_proj.lora_A.weight": [4, 64]}, "lora", "LoRA loader"),
        ({"clip_g": [2, 1280]}, "embedding", "is a textual-inversion embedding"),
        ({"model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3]}, "unknown", "input_blocks.0.0.weight"),
        ({}, "unknown", "no tensors"),
    ],
)
def test_files_of_another_kind(tmp_path, shapes, stage, word):
    info = inspect_file(header_only(tmp_path / "x.safetensors", shapes))
    assert info.stage == stage
    with pytest.raises(CheckpointError, match=word):
        info.component("stage_c")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.ckpt", b"PK\x03\x04" + bytes(60), "PyTorch pickle.*docs/checkpoints.md"),
        ("x.safetensors", b"PK\x03\x04" + bytes(60), "PyTorch pickle"),
        ("x.safetensors", b"\x80\x02}q\x00" + bytes(60), "PyTorch pickle"),
        ("x.safetensors", b"\n<!DOCTYPE html><html>", "web page"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer.*git lfs pull"),
        ("x.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(20), "GGUF"),
        ("x.safetensors", b"", "is empty"),
        ("x.safetensors", b"hello", "not a safetensors file"),
        ("x.safetensors", (90).to_bytes(8, "little") + b"{" + bytes(40), r"cut short: it has 49 bytes.*takes 98"),
        ("x.safetensors", (9).to_bytes(8, "little") + b"{not json", "not valid JSON"),
        ("x.safetensors", (2).to_bytes(8, "little") + b"{}tail", "has 14 bytes where its header describes 10"),
    ],
    ids=["zip", "zip renamed", "pickle renamed", "html", "lfs", "gguf", "empty", "text", "short", "json", "long"],
)
def test_files_that_are_not_safetensors(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s)^{name}.*{words}") as caught:
        inspect_file(tmp_path / name)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_pickle_as_torch_writes_it(tmp_path):
    for zipped in (True, False):
        file = tmp_path / f"model_{zipped}.safetensors"
        torch.save({"clf.1.weight": torch.zeros(3)}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"PyTorch pickle"):
            inspect_file(file)


def test_header_that_lies(tmp_path):
    def write(tensors):
        text = json.dumps(tensors).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        return tmp_path / "x.safetensors"

    with pytest.raises(CheckpointError, match=r"'a' 16 bytes where F32 .* takes 12"):
        inspect_file(write({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}))
    with pytest.raises(CheckpointError, match=r"'a' in a way that is not understood .dtype 'Q4'"):
        inspect_file(write({"a": {"dtype": "Q4", "shape": [3], "data_offsets": [0, 16]}}))
    item = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    with pytest.raises(CheckpointError, match=r"gap or an overlap before the tensor 'b'"):
        inspect_file(write({"a": item, "b": item | {"data_offsets": [4, 12]}}))


def test_truncated_file(tmp_path):
    file = header_only(tmp_path / "stage_c.safetensors", MANIFESTS["stage_c_1b_lite"])
    with file.open("r+b") as handle:
        handle.truncate(3_000_000_000)
    with pytest.raises(CheckpointError, match=r"cut short: it has 3,000,000,000 bytes and its header promises 4,123"):
        inspect_file(file)


def test_folders_that_are_not_one_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not exist"):
        inspect_file(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"no safetensors file"):
        inspect_file(tmp_path)
    header_only(tmp_path / "prior/model.safetensors", {})
    header_only(tmp_path / "decoder/model.safetensors", {})
    with pytest.raises(CheckpointError, match=r"a whole pipeline .*\(decoder, prior\)"):
        inspect_file(tmp_path)
    header_only(tmp_path / "one.safetensors", {})
    header_only(tmp_path / "two.safetensors", {})
    with pytest.raises(CheckpointError, match=r"holds 2 safetensors files"):
        inspect_file(tmp_path)
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a PyTorch pickle"):
        inspect_file(tmp_path / "old")


def test_networks_of_unknown_blocks(tmp_path):
    shapes = GOLDEN_KEYS["stage_c_two_level"]
    with pytest.raises(CheckpointError, match=r"'down_blocks.0.1' the tensors .*fit no known block"):
        inspect_file(header_only(tmp_path / "x.safetensors", shapes | {"down_blocks.0.1.conv.weight": [3]}))
    hole = {name: shape for name, shape in shapes.items() if not name.startswith("down_blocks.1.3.")}
    with pytest.raises(CheckpointError, match=r"'down_blocks.1.4' and lacks 'down_blocks.1.3'"):
        inspect_file(header_only(tmp_path / "x.safetensors", hole))
    uneven = {name: shape for name, shape in shapes.items() if not name.startswith("up_blocks.1.5.")}
    with pytest.raises(CheckpointError, match=r"at level 0 the blocks CTACTA on the way down and CTACT on the way up"):
        inspect_file(header_only(tmp_path / "x.safetensors", uneven))
    with pytest.raises(CheckpointError, match=r"'clip_txt_mapper.weight' with shape .5., which fits no known block"):
        inspect_file(header_only(tmp_path / "x.safetensors", shapes | {"clip_txt_mapper.weight": [5]}))
