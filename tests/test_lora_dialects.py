"""LoRA files: every dialect is recognised, read and written, and a change stays the same change."""

import json

import pytest
import torch
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_kit import ATTENTION, deltas, random_change, random_lora, same_change, small_stage_c, thirds
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stable_cascade_nodes.cascade_ops.adapters.dialects import (
    DIALECTS,
    dialect_of,
    read_lora,
    read_tokens,
    write_lora,
)
from stable_cascade_nodes.cascade_ops.adapters.dialects.reference import adaptable, walked
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA
from stable_cascade_nodes.cascade_ops.adapters.tokens import LearnedToken, write_embedding
from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file

FUSED = ATTENTION + "in_proj_weight"
OUT = ATTENTION + "out_proj.weight"
TEXT = "text_model.encoder.layers.3.self_attn.q_proj.weight"
MODEL = small_stage_c()
BASE = adaptable(MODEL)
POINTWISE = [name for name, shape in BASE.items() if len(shape) == 2 or shape[2:].numel() == 1]


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def without_metadata(path):
    """What a tool that drops metadata leaves."""
    save_file(load_file(path), path)
    return path


@settings(max_examples=40, deadline=None)
@given(
    dialect=st.sampled_from(DIALECTS),
    names=st.lists(st.sampled_from([*POINTWISE, *thirds()]), min_size=1, max_size=6, unique=True),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1.0, 0.3, 8.0]),
    keep=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, dialect, names, rank, alpha, keep):
    lora = random_lora(MODEL, names, rank, alpha)
    path = write_lora(lora, tmp_path_factory.mktemp("lora") / "a.safetensors", dialect, base=MODEL, modules=[""])
    if not keep:
        without_metadata(path)
    again = read_lora(path, MODEL)
    assert dialect_of(load_file(path)) == dialect and not again.unread
    # Modules that the reference's layout has to hold have no change.
    changed = {name: change for name, change in again.weights.items() if change.up.any()}
    same_change(changed, lora.weights, 2e-6)


@pytest.mark.parametrize("dialect", ["comfyui", "onetrainer", "diffusers"])
def test_convolutions_and_the_text_encoder_round_trip(tmp_path, dialect):
    lora = random_lora(MODEL, ["down_blocks.0.0.depthwise.weight", "embedding.1.weight"])
    lora = LoRA({**lora.weights, TEXT: random_change((6, 6)), "text_projection.weight": random_change((4, 6))})
    again = read_lora(write_lora(lora, tmp_path / "a.safetensors", dialect))
    same_change(again.weights, lora.weights)


@pytest.mark.parametrize("dialect", ["comfyui", "onetrainer"])
def test_dora_round_trips(tmp_path, dialect):
    lora = random_lora(MODEL, [FUSED, OUT, "down_blocks.0.0.depthwise.weight"], dora=True)
    again = read_lora(write_lora(lora, tmp_path / "a.safetensors", dialect))
    same_change(again.weights, lora.weights)


def test_diffusers_holds_one_dora_size_per_output(tmp_path):
    lora = LoRA({OUT: random_change((8, 8), dora_shape=(8, 1))})
    path = write_lora(lora, tmp_path / "a.safetensors", "diffusers")
    assert load_file(path)["prior.down_blocks.0.2.attention.to_out.0.lora_magnitude_vector.weight"].shape == (8,)
    same_change(read_lora(path).weights, lora.weights)
    with pytest.raises(ValueError, match="one size per input"):
        write_lora(random_lora(MODEL, [OUT], dora=True), tmp_path / "b.safetensors", "diffusers")


def test_fused_attention_is_split_exactly(tmp_path):
    lora = random_lora(MODEL, [FUSED], rank=3)
    change = lora.weights[FUSED]
    tensors = load_file(write_lora(lora, tmp_path / "a.safetensors"))
    stem = "lora_unet_down_blocks_0_2_attention_attn_to_"
    ups = [tensors[f"{stem}{letter}.lora_up.weight"] for letter in "qkv"]
    assert torch.equal(torch.cat(ups), change.up)
    for letter in "qkv":
        assert torch.equal(tensors[f"{stem}{letter}.lora_down.weight"], change.down)
        assert tensors[f"{stem}{letter}.alpha"] == change.alpha


def test_split_attention_of_different_ranks_fits_the_reference(tmp_path):
    query, key = thirds()[:2]
    lora = LoRA({query: random_change((8, 8), 1, 2.0, 1), key: random_change((8, 8), 3, 0.5, 2)})
    path = write_lora(lora, tmp_path / "a.safetensors", "reference", base=MODEL)
    change = read_lora(path, MODEL).weights[FUSED]
    same_change({FUSED: change}, lora.weights)
    assert change.rank == 4 and not deltas({FUSED: change})[FUSED][16:].any()


def test_comfyui_names(tmp_path):
    names = [FUSED, OUT, "clip_txt_pooled_mapper.weight", "down_blocks.0.1.mapper_sca.weight", "clf.1.weight"]
    names += ["up_blocks.1.0.channelwise.4.weight", "down_downscalers.1.1.blocks.0.weight"]
    lora = random_lora(MODEL, names)
    lora = LoRA({**lora.weights, TEXT: random_change((6, 6)), "text_projection.weight": random_change((4, 6))})
    keys = load_file(write_lora(lora, tmp_path / "a.safetensors"))
    # As ComfyUI 0.3.64's key maps have them, checked by loading such a file there.
    assert {key.removesuffix(".alpha") for key in keys if key.endswith(".alpha")} == {
        *(f"lora_unet_down_blocks_0_2_attention_attn_{part}" for part in ("to_q", "to_k", "to_v", "out_proj")),
        "lora_unet_clip_txt_pooled_mapper",
        "lora_unet_down_blocks_0_1_mapper_sca",
        "lora_unet_clf_1",
        "lora_unet_up_blocks_1_0_channelwise_4",
        "lora_unet_down_downscalers_1_1_blocks_0",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
        "lora_prior_te_text_projection",
    }


@pytest.mark.parametrize(
    ("key", "weight"),
    [
        ("lora_unet_down_blocks_0_2_attention_attn_to_q", thirds()[0]),
        ("lora_unet_down_blocks_0_2_attention_attn_in_proj_1", thirds()[1]),
        ("lora_unet_down_blocks_0_2_attention_attn_in_proj", FUSED),
        ("lora_prior_unet_down_blocks_0_2_attention_attn_out_proj", OUT),
        ("lora_prior_prior_down_blocks_0_2_attention_attn_to_out_proj", OUT),
        ("lora_prior_te_text_model_encoder_layers_3_self_attn_q_proj", TEXT),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj", TEXT),
        ("prior.down_blocks.0.2.attention.to_v", thirds()[2]),
        ("prior.down_blocks.0.2.attention.to_out.0", OUT),
        ("down_blocks.0.2.attention.attn.in_proj.0", thirds()[0]),
        ("diffusion_model.down_blocks.0.2.attention.attn.in_proj.2", thirds()[2]),
        ("diffusion_model.up_blocks.0.1.mapper_crp", "up_blocks.0.1.mapper_crp.weight"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", TEXT),
        ("lora_unet_down_blocks_0_2_kv_mapper_1", "down_blocks.0.2.kv_mapper.1.weight"),
        ("lora_unet_up_upscalers_0_1_blocks_1", "up_upscalers.0.1.blocks.1.weight"),
    ],
)
@pytest.mark.parametrize("leaves", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_names_of_every_vintage(tmp_path, key, weight, leaves):
    down, up = torch.rand(2, 8), torch.rand(24 if weight == FUSED else 8, 2)
    save_file({f"{key}.{leaves[0]}.weight": down, f"{key}.{leaves[1]}.weight": up}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.weights) == [weight]
    assert lora.weights[weight].scale == 1 and torch.equal(lora.weights[weight].up, up)


def test_what_is_not_understood_is_told(tmp_path):
    tensors = {f"lora_unet_clf_1.{leaf}.weight": torch.rand(2, 2) for leaf in ("lora_down", "lora_up")}
    strange = {
        "lora_unet_middle_block_1.lora_up.weight": torch.rand(2, 2),
        "lora_unet_embedding_1.lora_up.weight": torch.rand(2, 2),  # without its down
        "lora_unet_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),  # the wrong model
        "note": torch.rand(1),
    }
    save_file(tensors | strange, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.weights) == ["clf.1.weight"] and set(lora.unread) == set(strange)


def test_files_that_are_no_lora_are_refused(tmp_path):
    save_file({"lora_unet_strange_1_1.lora_up.weight": torch.rand(2, 2)}, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match=r"strange.safetensors holds no LoRA of Stable Cascade.*'lora_unet_strange"):
        read_lora(tmp_path / "strange.safetensors")
    save_file({f"clf.1.lora_{side}.weight": torch.rand(2, 3) for side in "AB"}, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"down \[2, 3\] and up \[2, 3\]"):
        read_lora(tmp_path / "broken.safetensors")


def test_the_reference_walks_the_model_in_its_own_order():
    order = walked(BASE, [""])
    assert order[:4] == [
        f"{name}.weight" for name in ("clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper")
    ] + ["embedding.1.weight"]
    block = [name for name in order if name.startswith("down_blocks.0.2.")]
    assert block == [OUT, FUSED, "down_blocks.0.2.kv_mapper.1.weight"]
    with safe_open(DATA / "golden" / "lora_reference_format.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["module_order"])
    recorded = [name.replace(".parametrizations", "").removesuffix(".0") for name in recorded]
    assert walked(sorted(recorded), [".attn"]) == recorded


def test_reference_files_want_their_base_model(tmp_path):
    lora = random_lora(MODEL, [FUSED, OUT])
    path = write_lora(lora, tmp_path / "a.safetensors", "reference", base=MODEL)
    assert set(load_file(path)) == {f"weights.{i}.lora_{side}" for i in range(8) for side in ("down", "up")}
    with pytest.raises(ValueError, match="expected the Stage C that it was trained on"):
        read_lora(path)
    with pytest.raises(ValueError, match=r"8 changes do not fit this Stage C .which has 4 for 'kv_mapper'"):
        read_lora(path, MODEL, modules=["kv_mapper"])


@pytest.mark.parametrize(
    ("name", "modules", "problem"),
    [
        ("down_blocks.0.0.depthwise.weight", [""], "places of a kernel"),
        ("clf.1.weight", [".attn"], "outside of the trained modules"),
        (TEXT, [".attn"], "outside of the trained modules"),
    ],
)
def test_the_reference_has_no_place_for_some_changes(tmp_path, name, modules, problem):
    shape = BASE.get(name, (6, 6))
    with pytest.raises(ValueError, match=problem):
        write_lora(LoRA({name: random_change(shape)}), tmp_path / "a", "reference", base=MODEL, modules=modules)
    with pytest.raises(ValueError, match="is a DoRA"):
        write_lora(random_lora(MODEL, [OUT], dora=True), tmp_path / "a", "reference", base=MODEL)
    assert not list(tmp_path.iterdir())


TOKENS = (
    LearnedToken("[fernando]", "dog", torch.rand(1, 10), torch.rand(1, 10)),
    LearnedToken("cat", "", torch.rand(1, 10), torch.rand(1, 10)),
)


def same_tokens(found, expected, kinds):
    assert [(token.token, token.init) for token in found] == [(token.token, token.init) for token in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for kind in kinds:
            assert torch.equal(getattr(ours, kind), getattr(theirs, kind))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tokens_travel_with_the_lora(tmp_path, dialect):
    lora = random_lora(MODEL, [OUT], tokens=TOKENS)
    path = write_lora(lora, tmp_path / "a.safetensors", dialect, base=MODEL)
    same_tokens(read_lora(path, MODEL).tokens, TOKENS, ("vectors", "delta"))
    same_tokens(read_tokens(path), TOKENS, ("vectors", "delta"))
    if dialect in ("comfyui", "diffusers"):
        assert all("lora_" in key or key.endswith(".alpha") for key in load_file(path))


def test_tokens_of_tools_without_our_metadata(tmp_path):
    lora = random_lora(MODEL, [OUT], tokens=TOKENS)
    path = without_metadata(write_lora(lora, tmp_path / "a.safetensors", "reference", base=MODEL))
    found = read_lora(path, MODEL).tokens
    assert [(token.token, token.row) for token in found] == [("", 49408), ("cat", 2368)]
    assert torch.equal(found[0].delta, TOKENS[0].delta)
    same_tokens(read_lora(path, MODEL, tokens=[("[fernando]", "dog"), ("cat", "")]).tokens, TOKENS, ("delta",))
    same_tokens(read_lora(path, MODEL, tokens=[("[fernando]", "dog")]).tokens, TOKENS, ("delta",))
    with pytest.raises(ValueError, match=r"holds 1 learned words that are new, and 3 names were given .a, b, c."):
        read_lora(path, MODEL, tokens=[("a", ""), ("b", ""), ("c", "")])

    path = without_metadata(write_lora(lora, tmp_path / "b.safetensors", "onetrainer"))
    found = {token.token: token.vectors for token in read_lora(path).tokens}
    assert torch.equal(found["<fernando>"], TOKENS[0].vectors) and torch.equal(found["<cat>"], TOKENS[1].vectors)


def test_the_reference_holds_one_vector_per_token(tmp_path):
    lora = random_lora(MODEL, [OUT], tokens=[LearnedToken("[two]", "", torch.rand(2, 10), torch.rand(2, 10))])
    with pytest.raises(ValueError, match=r"'\[two\]' has 2 vectors"):
        write_lora(lora, tmp_path / "a.safetensors", "reference", base=MODEL)
    same_tokens(read_lora(write_lora(lora, tmp_path / "a.safetensors")).tokens, lora.tokens, ("vectors",))


def test_embedding_files(tmp_path):
    token = LearnedToken("[fernando]", "dog", torch.rand(3, 10))
    path = write_embedding(tmp_path / "fernando.safetensors", token)
    assert torch.equal(load_file(path)["clip_g"], token.vectors) and inspect_file(path).stage == "embedding"
    same_tokens(read_tokens(path), [token], ("vectors",))
    assert read_tokens(without_metadata(path))[0].token == "[fernando]"
    with pytest.raises(ValueError, match="complete it with the text encoder"):
        write_embedding(tmp_path / "b.safetensors", LearnedToken("[b]", delta=torch.rand(1, 10)))
    assert not (tmp_path / "b.safetensors").exists()


def test_the_golden_file_has_a_token():
    (token,) = read_tokens(DATA / "golden" / "lora_reference_format.safetensors", [("[fernando]", "dog")])
    assert token.delta.shape == (1, 1280) and token.vectors is None and token.row == 49


def test_metadata_says_what_the_file_is(tmp_path):
    config = {"rank": 2, "alpha": 1.5, "modules": [".attn"], "base": "Stage C tiny"}
    lora = random_lora(MODEL, [OUT], config=config)
    for dialect in DIALECTS:
        path = write_lora(lora, tmp_path / f"{dialect}.safetensors", dialect, base=MODEL)
        said = metadata(path)
        assert said["cascade.stage"] == "lora" and json.loads(said["cascade.config"]) == config
        assert dict(read_lora(path, MODEL).config) == config and inspect_file(path).stage == "lora"
    said = metadata(tmp_path / "comfyui.safetensors")
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "1.5")
    with pytest.raises(ValueError, match="dialect 'kohya' is unknown, expected one of comfyui"):
        write_lora(lora, tmp_path / "a.safetensors", "kohya")
