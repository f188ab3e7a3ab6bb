"""IP-Adapter: decoupled attention against a plain computation, what leaves Stage C as it is, files, refusals."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stable_cascade_nodes.cascade_ops.checkpoints import CheckpointError, inspect_file, load, save
from stable_cascade_nodes.cascade_ops.models import IPAdapter, StageC
from stable_cascade_nodes.cascade_ops.models.layers import Attention, AttnBlock
from stable_cascade_nodes.cascade_ops.training.memory_saving import checkpoint_blocks
from stable_cascade_nodes.nodes.comfyui_layers import LentAttention, rebuilt

WIDTHS = [32, 32, 48, 48, 48, 48, 32, 32]
LEVELS = torch.tensor([0.9, 0.4])


def make_model(seed=0):
    """Two levels of different widths and two attention blocks in each half; every weight is random."""
    torch.manual_seed(seed)
    model = StageC(c_in=4, c_out=4, c_cond=24, c_hidden=[32, 48], nhead=[4, 3], blocks=[[2, 2], [2, 2]],
                   c_clip_text=12, c_clip_text_pooled=8, c_clip_img=10, switch_level=[True])  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_adapter(seed=1, tokens=3):
    torch.manual_seed(seed)
    adapter = IPAdapter(10, 24, WIDTHS, tokens)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.4)
    return adapter.eval()


def numbers(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXT = (numbers(2, 5, 12), numbers(2, 1, 8, seed=6), numbers(2, 1, 10, seed=7))
X = numbers(2, 4, 8, 8, seed=8)
PICTURES = numbers(2, 2, 10, seed=9)


def run(model, *attentions, x=X):
    with torch.no_grad():
        return model.step(x, model.prepare(LEVELS, *TEXT, decoupled=attentions), 1)


def plain_block(block, condition, x, image_key, image_value, weight):
    """An attention block head by head, in float64. weight: ``[B, L]``."""
    attention = block.attention["attn"]
    c = x.shape[-1]
    tokens = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    tokens = tokens.flatten(1, 2)
    condition = torch.nn.functional.silu(condition) @ block.kv_mapper[1].weight.T + block.kv_mapper[1].bias
    w, b = attention.in_proj_weight, attention.in_proj_bias
    query = tokens @ w[:c].T + b[:c]
    seen = torch.cat([tokens, condition], dim=1)
    key, value = seen @ w[c : 2 * c].T + b[c : 2 * c], seen @ w[2 * c :].T + b[2 * c :]
    heads = []
    for q, k, v, ik, iv in zip(*(t.chunk(attention.nhead, -1) for t in (query, key, value, image_key, image_value))):  # noqa: B905 - equal
        scale = q.shape[-1] ** -0.5
        own = (q @ k.mT * scale).softmax(-1) @ v
        heads.append(own + weight[..., None] * ((q @ ik.mT * scale).softmax(-1) @ iv))
    out = torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
    return x + out.view_as(x)


def test_every_block_attends_to_text_and_pictures_apart():
    model, adapter = make_model(), make_adapter()
    weights = [0.7, 1.0, -0.5, 0.3, 1.2, 0.9, 0.4, 0.8]
    mask = torch.rand(2, 16, 8, generator=torch.Generator().manual_seed(3))
    seen, given = [], []
    for block in model.blocks_of(AttnBlock):
        # Blocks write over what they are given.
        block.register_forward_pre_hook(lambda block, inputs: given.append(inputs[0].clone()))
        block.register_forward_hook(lambda block, inputs, output: seen.append((block, given.pop(), output.clone())))
    run(model, adapter.attention(PICTURES, weights, mask))

    assert [block for block, _, _ in seen] == model.blocks_of(AttnBlock)
    model, tensors = model.double(), {name: tensor.double() for name, tensor in adapter.state_dict().items()}
    projected = PICTURES.double() @ tensors["image_proj.proj.weight"].T + tensors["image_proj.proj.bias"]
    tokens = projected.reshape(2, 6, 24)
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    tokens = tokens * tensors["image_proj.norm.weight"] + tensors["image_proj.norm.bias"]
    condition = model.condition_tokens(*TEXT)
    for number, (block, x, output) in enumerate(seen):
        key, value = (tokens @ tensors[f"ip_adapter.{number}.to_{part}_ip.weight"].T for part in "kv")
        rows, columns = x.shape[1:3]
        small = mask.double().view(2, rows, 16 // rows, columns, 8 // columns).mean(dim=(2, 4)).flatten(1)
        wanted = plain_block(block, condition, x.double(), key, value, weights[number] * small)
        assert (output - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert {tuple(x.shape[1:]) for _, x, _ in seen} == {(8, 8, 32), (4, 4, 48)}


def test_weight_zero_and_a_new_adapter_leave_stage_c_as_it_is():
    model, adapter = make_model(), make_adapter()
    without = run(model)
    assert torch.equal(run(model, adapter.attention(PICTURES, 0)), without)
    assert torch.equal(run(model, adapter.attention(PICTURES, 1, torch.zeros(1, 5, 5))), without)
    assert torch.equal(run(model, IPAdapter(10, 24, WIDTHS).attention(PICTURES)), without)
    assert (run(model, adapter.attention(PICTURES)) - without).abs().max() > 1e-2


def test_a_weight_per_block_reaches_that_block_alone():
    model, adapter = make_model(), make_adapter()
    outputs = [run(model, adapter.attention(PICTURES, [float(i == block) for i in range(8)])) for block in range(8)]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(outputs) for b in [*outputs[:i], run(model)])


def test_masks_of_ones_and_of_single_cells_are_weights():
    model, adapter = make_model(), make_adapter()
    whole = run(model, adapter.attention(PICTURES))
    assert torch.equal(run(model, adapter.attention(PICTURES, 1, torch.ones(1, 13, 7))), whole)
    first_only = run(model, adapter.attention(PICTURES, 1, torch.tensor([1.0, 0.0])[:, None, None]))
    assert torch.equal(first_only[0], whole[0])
    assert torch.equal(first_only[1], run(model)[1])


def test_a_masked_block_changes_where_the_mask_is():
    model, adapter = make_model(), make_adapter()
    block = model.blocks_of(AttnBlock)[0]
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    x = numbers(2, 8, 8, 32, seed=11)
    key_value = block.prepare(model.condition_tokens(*TEXT))
    with_ = block(x, key_value, [adapter.attention(PICTURES, 1, mask).at(0, (8, 8))])
    changed = (with_ - block(x, key_value)).abs().amax(dim=(0, 3))
    assert changed[:, :4].max() < 1e-6 < 1e-2 < changed[:, 4:].min()


def test_adapters_add_up_and_pictures_can_be_shared_or_narrowed():
    model, adapter = make_model(), make_adapter()
    block = model.blocks_of(AttnBlock)[0]
    x, key_value = numbers(2, 8, 8, 32, seed=11), block.prepare(model.condition_tokens(*TEXT))
    one, other = (make_adapter(seed).attention(PICTURES).at(0, (8, 8)) for seed in (1, 2))
    parts = [block(x, key_value, which) - block(x, key_value) for which in ([one], [other], [one, other])]
    assert torch.allclose(parts[0] + parts[1], parts[2], atol=1e-5)

    shared = run(model, adapter.attention(PICTURES[:1]))
    assert torch.allclose(shared, run(model, adapter.attention(PICTURES[:1].repeat(2, 1, 1))), atol=1e-6)
    masks = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    for attention in (adapter.attention(PICTURES, 1, masks), adapter.attention(PICTURES[:1], 1, masks)):
        part = model.prepare(LEVELS, *TEXT, decoupled=[attention]).narrow(1, 1)
        with torch.no_grad():
            assert torch.allclose(model.step(X[1:], part, 1), run(model, attention)[1:], atol=1e-5)


def test_forward_is_prepare_and_step_and_gradients_reach_the_adapter():
    model, adapter = make_model().requires_grad_(False), make_adapter()
    output = model(X, LEVELS[1].expand(2), *TEXT, decoupled=[adapter.attention(PICTURES)])
    assert torch.allclose(output, run(model, adapter.attention(PICTURES)), atol=1e-4)
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())

    checkpoint_blocks(model)
    again = make_adapter()
    model(X, LEVELS[1].expand(2), *TEXT, decoupled=[again.attention(PICTURES)]).square().mean().backward()
    for name, parameter in again.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_a_float32_adapter_serves_a_bfloat16_model():
    model, adapter = make_model(), make_adapter()
    exact = run(model, adapter.attention(PICTURES, 0.5))
    half = run(model.bfloat16(), adapter.attention(PICTURES, 0.5, torch.ones(1, 2, 2)))
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_layers_of_a_host_read_pictures_too():
    model, adapter = make_model(), make_adapter()

    def lend(name, layer):
        if type(layer) is not Attention:
            return None
        thirds = []
        for weight, bias in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True):
            third = nn.Linear(len(bias), len(bias))
            third.weight, third.bias = nn.Parameter(weight), nn.Parameter(bias)
            thirds.append(third)
        return LentAttention(layer.nhead, layer.dropout, thirds, layer.out_proj)

    lent = rebuilt(model, lend)
    assert torch.allclose(
        run(lent, adapter.attention(PICTURES)), run(model, adapter.attention(PICTURES)), rtol=1e-4, atol=1e-4
    )
    adapter.check(lent)


def test_a_file_comes_back_as_it_was(tmp_path):
    adapter = make_adapter()
    config = IPAdapter.config_for(make_model(), 10, 3)
    path = save(adapter, tmp_path / "adapter.safetensors", stage="ip_adapter", config=config, name="mine")
    info = inspect_file(path)
    assert (info.stage, info.size, info.config, info.unknown) == ("ip_adapter", "mine", config, ())
    assert info.title == "IP-Adapter mine"
    assert info.parameters == sum(parameter.numel() for parameter in adapter.parameters())
    loaded, _ = load(path, "ip_adapter")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in adapter.state_dict().items())
    model = make_model()
    assert torch.equal(run(model, loaded.attention(PICTURES)), run(model, adapter.attention(PICTURES)))

    save_file(load_file(path), tmp_path / "bare.safetensors")
    bare = inspect_file(tmp_path / "bare.safetensors")
    assert json.loads(json.dumps(bare.config)) == config
    assert (bare.stage, bare.size) == ("ip_adapter", "custom")


def test_files_that_are_not_ours_are_refused(tmp_path):
    tensors = dict(make_adapter().state_dict())

    def refused(changed, match):
        save_file(changed, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=match):
            load(tmp_path / "other.safetensors", "ip_adapter")

    # Stable Diffusion's adapters count all attention layers, of which every second one reads pictures.
    elsewhere = {
        f"ip_adapter.{2 * int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}" if name.startswith("ip_") else name: t
        for name, t in tensors.items()
    }
    refused(elsewhere, "belong to no known Stable Cascade model")
    refused({name: t for name, t in tensors.items() if name != "ip_adapter.3.to_v_ip.weight"}, "lacks the tensor")
    refused({name: t for name, t in tensors.items() if "ip_adapter.3." not in name}, "the model has no place for")
    refused({**tensors, "ip_adapter.2.to_v_ip.weight": torch.zeros(3, 24)}, r"with shape \[3, 24\]")
    refused({name: t for name, t in tensors.items() if "norm" not in name}, "image_proj.norm.weight")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda: IPAdapter(10, 24, WIDTHS, 0), "0 tokens for 8 attention blocks"),
        (lambda: IPAdapter(10, 24, []), "for 0 attention blocks"),
        (lambda: make_adapter().attention(numbers(2, 1, 9)), r"\(2, 1, 9\), expected .* 10\]"),
        (lambda: make_adapter().attention(PICTURES, [1.0, 2.0]), "2 weights were given for an IP-Adapter of 8"),
        (lambda: IPAdapter(10, 24, [32, 48]).check(make_model()),
         "1 attention block of width 32 and 1 attention block of width 48 and this Stage C has 4 .* 32 and 4"),
        (lambda: run(make_model(), make_adapter().attention(numbers(3, 1, 10))), r"\(3, 3, 64\) for attention block 0"),
        (lambda: run(make_model(), make_adapter().attention(PICTURES, 1, torch.ones(3, 4, 4))), r"mask .* \(3, 4, 4\)"),
        (lambda: run(make_model(), make_adapter().attention(PICTURES, 1, torch.ones(4, 4))), r"mask .* \(4, 4\)"),
        (lambda: run(make_model(), IPAdapter(10, 24, WIDTHS[:3]).attention(PICTURES)), "3 attention blocks and .* 8"),
        (lambda: run(make_model(), IPAdapter(10, 24, [16] * 8).attention(PICTURES)), "a width of 64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(wrong, found):
    with pytest.raises(ValueError, match=found):
        wrong()


def test_a_run_without_its_adapter_is_the_plain_run():
    model, adapter = make_model(), make_adapter()
    prepared = model.prepare(LEVELS, *TEXT, decoupled=[adapter.attention(PICTURES)])
    with torch.no_grad():
        assert torch.equal(model.step(X, dataclasses.replace(prepared, decoupled=()), 1), run(model))
