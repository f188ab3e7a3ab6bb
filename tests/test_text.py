"""The text encoder against CLIP's forward pass written out here, in float64, from the paper's description."""

import math

import pytest
import torch
from safetensors.torch import save_file

from stable_cascade_nodes.cascade_ops.text import TextEncoder
from stable_cascade_nodes.cascade_ops.tokenizer import END_TOKEN, default_tokenizer, pad_tokens

ROWS = 49408


def random_state(width, layers=2, projection=48, heads_per=64, positions=77, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inner = 3 * width
    shapes = {
        "text_model.embeddings.token_embedding.weight": (ROWS, width),
        "text_model.embeddings.position_embedding.weight": (positions, width),
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
        "text_projection.weight": (projection, width),
    }
    for layer in range(layers):
        prefix = f"text_model.encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{prefix}self_attn.{name}.weight": (width, width), f"{prefix}self_attn.{name}.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
        shapes |= {f"{prefix}mlp.fc1.weight": (inner, width), f"{prefix}mlp.fc1.bias": (inner,)}
        shapes |= {f"{prefix}mlp.fc2.weight": (width, inner), f"{prefix}mlp.fc2.bias": (width,)}
    state = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 and "embedding" not in name else 0.5
        state[name] = scale * torch.randn(shape, generator=generator) + (1.0 if "norm" in name else 0.0)
    return state


def reference(state, ids, mask, heads, activation="gelu", replaced=None):
    """CLIP's text tower: hidden states after the last layer, and the projected one at the first end token."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def act(x):
        return x * (0.5 * (1 + torch.erf(x / math.sqrt(2))) if activation == "gelu" else torch.sigmoid(1.702 * x))

    embedded = w["text_model.embeddings.token_embedding.weight"][ids]
    for (row, place), vector in (replaced or {}).items():
        embedded[row, place] = vector.double()
    x = embedded + w["text_model.embeddings.position_embedding.weight"][: ids.shape[1]]
    batch, length, width = x.shape
    visible = torch.ones(length, length).tril().bool()[None] & mask.bool()[:, None]
    layers = len([name for name in w if name.endswith("q_proj.weight")])
    for layer in range(layers):
        prefix = f"text_model.encoder.layers.{layer}."
        y = norm(x, prefix + "layer_norm1")
        q, k, v = (
            linear(y, f"{prefix}self_attn.{name}_proj").reshape(batch, length, heads, width // heads).transpose(1, 2)
            for name in "qkv"
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(width // heads)
        scores = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).reshape(batch, length, width), prefix + "self_attn.out_proj")
        x = x + linear(act(linear(norm(x, prefix + "layer_norm2"), prefix + "mlp.fc1")), prefix + "mlp.fc2")
    ends = [row.tolist().index(END_TOKEN) for row in ids]
    last = torch.stack([x[row, end] for row, end in enumerate(ends)])
    return x, norm(last, "text_model.final_layer_norm") @ w["text_projection.weight"].T


def tokens(*prompts, length=77):
    ids, masks = zip(*(pad_tokens(default_tokenizer().encode(prompt), length) for prompt in prompts), strict=True)
    return torch.tensor(ids), torch.tensor(masks)


def assert_close(actual, expected, tolerance=2e-5):
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def state():
    return random_state(64)


@pytest.fixture(scope="module")
def encoder(state):
    return TextEncoder.from_state_dict(state)


@pytest.mark.parametrize(
    ("width", "layers", "config", "heads", "activation"),
    [
        (64, 2, None, 1, "gelu"),
        (128, 3, {}, 2, "gelu"),
        (128, 1, {"num_attention_heads": 4, "hidden_act": "quick_gelu"}, 4, "quick_gelu"),
        (96, 2, {"num_attention_heads": 3, "hidden_size": 96, "eos_token_id": 2}, 3, "gelu"),
        (512, 1, None, 8, "quick_gelu"),
    ],
)
def test_equals_clip(width, layers, config, heads, activation):
    state = random_state(width, layers)
    encoder = TextEncoder.from_state_dict(state, config)
    ids, mask = tokens("a photo of a cat", "", "a red square " * 25)
    hidden, pooled = encoder.encode_tokens(ids, mask)
    expected_hidden, expected_pooled = reference(state, ids, mask, heads, activation)
    assert_close(hidden, expected_hidden)
    assert_close(pooled, expected_pooled)
    assert (encoder.width, encoder.pooled_width, encoder.length) == (width, 48, 77)


@pytest.mark.parametrize("prompt", ["", "a photo of a cat", "cat " * 75, "x <|endoftext|> y"])
def test_prompt_equals_its_tokens(encoder, state, prompt):
    ids, mask = tokens(prompt)
    hidden, pooled = reference(state, ids, mask, 1)
    result = encoder.encode(prompt)
    assert_close(result.hidden, hidden)
    assert_close(result.pooled, pooled)


def test_padding_changes_nothing_before_it(encoder):
    long = encoder.encode_tokens(*tokens("a cat"))
    short = encoder.encode_tokens(*tokens("a cat", length=4))
    assert_close(short[0], long[0][:, :4])
    assert_close(short[1], long[1])


def test_padding_is_masked(encoder):
    ids, mask = tokens("a cat")
    hidden, pooled = encoder.encode_tokens(ids, mask)
    ids[0, 10] = 320
    other, other_pooled = encoder.encode_tokens(ids, mask)
    changed = (hidden != other).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [10]
    assert torch.equal(pooled, other_pooled)


def test_a_run_repeats_and_needs_no_gradient(encoder):
    first, second = encoder.encode("a (cat:1.3)"), encoder.encode("a (cat:1.3)")
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.pooled, second.pooled)
    assert not first.hidden.requires_grad
    plain = encoder.encode("a cat")
    assert not plain.hidden.is_inference() and not plain.pooled.is_inference()  # so that training may use it


def test_long_prompts(encoder, state):
    prompt = "a red cat sits on a blue mat, " * 20
    ids = default_tokenizer().encode(prompt)
    result = encoder.encode(prompt)
    assert len(ids) == 180
    assert result.hidden.shape == (1, 3 * 77, 64)
    for chunk in range(3):
        hidden, pooled = encoder.encode_tokens(*(torch.tensor([part]) for part in pad_tokens(ids[75 * chunk :][:75])))
        assert_close(result.hidden[:, 77 * chunk :][:, :77], hidden)
        if chunk == 0:
            assert_close(result.pooled, pooled)


def test_weights(encoder):
    plain, empty = encoder.encode("a big cat"), encoder.encode("")
    weighted = encoder.encode("a (big:1.5) (cat:0)")
    expected = plain.hidden.clone()
    expected[0, 2] = empty.hidden[0, 2] + 1.5 * (plain.hidden[0, 2] - empty.hidden[0, 2])
    expected[0, 3] = empty.hidden[0, 3]
    assert_close(weighted.hidden, expected)
    assert_close(weighted.pooled, plain.pooled)
    assert torch.equal(encoder.encode("a (big:1.0) cat").hidden, plain.hidden)


def test_weights_in_a_later_chunk(encoder):
    plain, empty = encoder.encode("cat " * 76), encoder.encode("")
    weighted = encoder.encode("cat " * 75 + "(cat:2)")
    expected = plain.hidden.clone()
    expected[0, 78] = 2 * plain.hidden[0, 78] - empty.hidden[0, 1]
    assert_close(weighted.hidden, expected)
    assert not torch.allclose(plain.hidden[0, 78], expected[0, 78])


def test_embeddings(encoder, state, tmp_path):
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    save_file({"clip_g": vectors}, tmp_path / "foo.safetensors")

    def find(name):
        return tmp_path / "foo.safetensors" if name == "foo" else None

    result = encoder.encode("a embedding:foo cat", find)
    ids, mask = tokens("a a a cat")
    hidden, pooled = reference(state, ids, mask, 1, replaced={(0, 2): vectors[0], (0, 3): vectors[1]})
    assert_close(result.hidden, hidden)
    assert_close(result.pooled, pooled)

    weighted, empty = encoder.encode("a (embedding:foo:1.2) cat", find), encoder.encode("")
    expected = result.hidden.clone()
    expected[0, 2:4] = empty.hidden[0, 2:4] + 1.2 * (result.hidden[0, 2:4] - empty.hidden[0, 2:4])
    assert_close(weighted.hidden, expected)

    save_file({"clip_g": torch.zeros(1, 1280)}, tmp_path / "foo.safetensors")
    with pytest.raises(ValueError, match="width 64"):
        encoder.encode("embedding:foo", find)


def test_compact_token_table(state):
    rows = torch.tensor([END_TOKEN, 49406, 2368, 320])
    table = state["text_model.embeddings.token_embedding.weight"]
    compact = {**state, "text_model.embeddings.token_embedding.weight": table[rows], "token_rows": rows}
    full = table[rows].mean(0).repeat(ROWS, 1)
    full[rows] = table[rows]
    spread = {**state, "text_model.embeddings.token_embedding.weight": full}
    encoder = TextEncoder.from_state_dict(compact)
    ids, mask = tokens("a cat on a mat")
    hidden, pooled = encoder.encode_tokens(ids, mask)
    expected_hidden, expected_pooled = reference(spread, ids, mask, 1)
    assert_close(hidden, expected_hidden)
    assert_close(pooled, expected_pooled)
    wrong = (rows[:3], rows[None], rows.float(), rows.clamp(max=49406), torch.tensor([END_TOKEN, 49406, 1, ROWS]))
    for bad in wrong:
        with pytest.raises(ValueError, match="token_rows"):
            TextEncoder.from_state_dict({**compact, "token_rows": bad})
    with pytest.raises(ValueError, match="hold 49406 and 49407"):
        TextEncoder.from_state_dict({**compact, "token_rows": torch.tensor([1, 2, 3, 4])})


def test_weights_are_shared_and_nothing_stays_on_meta(state, encoder):
    parameters = dict(encoder.module.named_parameters())
    assert parameters.keys() == state.keys()
    assert all(parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    everything = [*parameters.values(), *encoder.module.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in everything)
    assert not encoder.module.training


def test_type_of_the_weights(state):
    half = TextEncoder.from_state_dict({name: tensor.bfloat16() for name, tensor in state.items()})
    assert (half.dtype, half.encode("a cat").hidden.dtype) == (torch.bfloat16, torch.float32)
    cast = TextEncoder.from_state_dict(state, dtype=torch.bfloat16)
    assert torch.equal(cast.encode("a cat").hidden, half.encode("a cat").hidden)
    full = TextEncoder.from_state_dict(state).encode("a cat")
    assert (cast.encode("a cat").hidden - full.hidden).abs().max() < 0.1 * full.hidden.abs().max()


def test_to_gives_another_handle(encoder):
    assert encoder.to("cpu") is encoder
    moved = encoder.to("meta")
    assert (moved.device.type, encoder.device.type) == ("meta", "cpu")
    assert moved.tokenizer is encoder.tokenizer
    assert moved.module.config.num_attention_heads == encoder.module.config.num_attention_heads


def test_unused_tensors_of_published_files(state, encoder):
    extra = {"logit_scale": torch.tensor(1.0), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    assert torch.equal(TextEncoder.from_state_dict(state | extra).encode("a").hidden, encoder.encode("a").hidden)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: without(s, "text_projection.weight"), None, "lacks the tensor text_projection.weight"),
        (lambda s: without(s, "text_model.encoder.layers.0.layer_norm1.bias"), None, r"layers\.0\.layer_norm1\.bias"),
        (lambda s: {}, None, "lacks the tensor text_model.embeddings"),
        (
            lambda s: {**s, "clf.1.weight": torch.zeros(1)},
            None,
            r"1 tensors that CLIP does not have \(clf\.1\.weight\)",
        ),
        (lambda s: {**s, "text_model.final_layer_norm.bias": torch.zeros(32)}, None, r"\[32\].*\[64\]"),
        (lambda s: {**s, "text_projection.weight": torch.zeros(32)}, None, "expected a matrix"),
        (lambda s: {**s, "text_model.embeddings.token_embedding.weight": torch.zeros(9, 64)}, None, "9 rows"),
        (lambda s: s, {"hidden_size": 1280}, "config says hidden_size 1280, its tensors say 64"),
        (lambda s: s, {"num_attention_heads": 5}, "cannot have num_attention_heads 5"),
        (lambda s: s, {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_wrong_state_dicts(state, change, config, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_state_dict(change(state), config)


def test_wrong_tokens(encoder):
    ids, mask = tokens("a cat")
    with pytest.raises(ValueError, match="no end token 49407"):
        encoder.encode_tokens(torch.full_like(ids, 320), mask)
    for wrong in ((ids[0], mask[0]), (ids, mask[:, :5]), (ids.repeat(1, 2), mask.repeat(1, 2))):
        with pytest.raises(ValueError, match="pad the ids"):
            encoder.encode_tokens(*wrong)
