"""What the networks promise beyond the golden files: preparing once, views of it, training, refusals."""

import pytest
import torch
from golden import build, read_golden, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops.models import ControlNet, StageA, StageB, StageC
from stable_cascade_nodes.cascade_ops.models.layers import GlobalResponseNorm, timestep_embedding

AGREEMENT = 1e-5
LEVELS = torch.tensor([0.99, 0.6, 0.3, 0.002])


@pytest.fixture
def stage_c():
    tensors, metadata = read_golden("stage_c_switch_level")
    return build(StageC, metadata), tensors, [tensors[k] for k in ("clip_text", "clip_text_pooled", "clip_img")]


@pytest.fixture
def stage_b():
    tensors, metadata = read_golden("stage_b_odd")
    return build(StageB, metadata), tensors


@torch.no_grad()
@pytest.mark.parametrize("index", range(len(LEVELS)))
def test_stage_c_prepared_run_agrees_with_forward(stage_c, index):
    model, tensors, text = stage_c
    sizes = {"sca": torch.tensor([0.1, 0.9]), "crp": torch.tensor([0.4, 0.2])}
    prepared = model.prepare(LEVELS, *text, **sizes)
    plain = model(tensors["x"], LEVELS[index].expand(2), *text, **sizes)
    assert relative_error(model.step(tensors["x"], prepared, index), plain) < AGREEMENT


@torch.no_grad()
def test_stage_b_prepared_run_agrees_with_forward(stage_b):
    model, tensors = stage_b
    x = tensors["x"]
    prepared = model.prepare(LEVELS, tensors["effnet"], tensors["clip"], x.shape[-2:], tensors["pixels"])
    for index, level in enumerate(LEVELS):
        plain = model(x, level.expand(2), tensors["effnet"], tensors["clip"], tensors["pixels"])
        assert relative_error(model.step(x, prepared, index), plain) < AGREEMENT


@torch.no_grad()
def test_narrow_is_the_run_of_a_part_of_the_batch(stage_c, stage_b):
    model, tensors, text = stage_c
    sizes = torch.tensor([0.1, 0.9])
    whole = model.step(tensors["x"], model.prepare(LEVELS, *text, sca=sizes), 1)
    part = model.step(tensors["x"][1:], model.prepare(LEVELS, *text, sca=sizes).narrow(1, 1), 1)
    assert relative_error(part, whole[1:]) < AGREEMENT
    assert relative_error(part, whole[:1]) > 0.1

    model, tensors = stage_b
    prepared = model.prepare(LEVELS, tensors["effnet"], tensors["clip"], tensors["x"].shape[-2:])
    whole = model.step(tensors["x"], prepared, 1)
    assert relative_error(model.step(tensors["x"][1:], prepared.narrow(1, 1), 1), whole[1:]) < AGREEMENT


@torch.no_grad()
def test_one_condition_serves_a_batch(stage_c):
    model, tensors, text = stage_c
    shared = model.prepare(LEVELS, *(t[:1] for t in text))
    repeated = model.prepare(LEVELS, *(t[:1].expand(2, -1, -1) for t in text))
    assert relative_error(model.step(tensors["x"], shared, 0), model.step(tensors["x"], repeated, 0)) < AGREEMENT


@torch.no_grad()
def test_every_text_input_matters(stage_c):
    model, tensors, text = stage_c
    usual = model(tensors["x"], tensors["r"], *text)
    for i in range(3):
        changed = [t + 0.5 if i == j else t for j, t in enumerate(text)]
        assert relative_error(model(tensors["x"], tensors["r"], *changed), usual) > 1e-3
    assert relative_error(model(tensors["x"], tensors["r"], text[0]), usual) > 1e-3


_WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1, 3, width=32))


def small_stage_c(dtype=torch.float32):
    torch.manual_seed(0)
    model = StageC(c_cond=16, c_hidden=[16, 16], nhead=[2, 2], blocks=[[1, 1], [1, 1]], c_clip_text=8,
                   c_clip_text_pooled=8, c_clip_img=6, c_clip_seq=3)  # fmt: skip
    torch.nn.init.normal_(model.clip_img_mapper.bias)
    return model.to(dtype)


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), count=st.integers(1, 4), shared=st.booleans(), half=st.booleans())
def test_the_weight_of_a_picture_moves_its_tokens_on_a_line(data, batch, count, shared, half):
    model = small_stage_c(torch.bfloat16 if half else torch.float32)
    rows = 1 if shared else batch
    weight = torch.tensor(data.draw(st.lists(_WEIGHTS, min_size=rows * count, max_size=rows * count)))
    weight = weight.reshape(rows, count)
    text, pooled, pictures = torch.randn(batch, 5, 8), torch.randn(batch, 1, 8), torch.randn(batch, count, 6)
    whole, nothing = (model.condition_tokens(text, pooled, each) for each in (pictures, torch.zeros_like(pictures)))
    found = model.condition_tokens(text, pooled, pictures, weight)
    assert found.shape == whole.shape == (batch, 5 + 3 + 3 * count, 16) and found.dtype == whole.dtype
    assert torch.equal(found[:, :8], whole[:, :8])
    for row in range(batch):
        for number in range(count):
            ours, theirs, none = (each[row, 8 + 3 * number :][:3] for each in (found, whole, nothing))
            amount = float(weight[0 if shared else row, number])
            if amount in (0, 1):
                assert torch.equal(ours, theirs if amount else none)
            expected = torch.lerp(none.double(), theirs.double(), amount)
            torch.testing.assert_close(
                ours.double(), expected, rtol=0.01 if half else 1e-5, atol=0.02 if half else 1e-5
            )


@torch.no_grad()
def test_the_weight_of_a_picture_reaches_a_prepared_run(stage_c):
    model, tensors, text = stage_c

    def run(**changes):
        return model.step(tensors["x"], model.prepare(LEVELS, *text, **changes), 1)

    pictures = text[2].shape[1]
    plain = run()
    assert torch.equal(run(clip_img_weight=torch.ones(1, pictures)), plain)
    rows = run(clip_img_weight=torch.tensor([[1.0], [0.3]]).expand(2, pictures))
    assert relative_error(rows[:1], plain[:1]) < AGREEMENT and relative_error(rows[1:], plain[1:]) > 1e-3
    # A single embedding is one picture.
    one = [*text[:2], text[2][:, 0]]
    found = model.condition_tokens(*one, torch.tensor([[0.3]]))
    assert torch.equal(found, model.condition_tokens(*one[:2], one[2][:, None], torch.tensor([[0.3]])))
    assert torch.equal(model.condition_tokens(*text[:2], None, torch.ones(1, 1)), model.condition_tokens(*text[:2]))


def test_every_parameter_learns(stage_c, stage_b):
    model, tensors, text = stage_c
    sizes = torch.tensor([0.1, 0.9])
    model(tensors["x"], tensors["r"], *text, sca=sizes, crp=sizes).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    model, tensors = stage_b
    output = model(tensors["x"], tensors["r"], tensors["effnet"], tensors["clip"], tensors["pixels"], sizes)
    output.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_fresh_model_predicts_zero():
    model = StageC(c_cond=32, c_hidden=[32, 32], nhead=[2, 2], blocks=[[1, 1], [1, 1]], c_clip_text=8,
                   c_clip_text_pooled=8, c_clip_img=8)  # fmt: skip
    output = model(torch.randn(1, 16, 4, 4), torch.tensor([0.5]), torch.randn(1, 3, 8))
    assert torch.equal(output, torch.zeros(1, 16, 4, 4))
    assert model.clip_txt_mapper.weight.std().item() == pytest.approx(0.02, rel=0.2)


@torch.no_grad()
def test_dtype_of_the_weights_decides(stage_c):
    model, tensors, text = stage_c
    exact = model(tensors["x"], tensors["r"], *text)
    half = model.bfloat16()(tensors["x"], tensors["r"], *text)
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), exact) < 0.1


def test_timestep_embedding_keeps_neighbouring_steps_apart():
    embeddings = timestep_embedding(torch.tensor([0.5, 0.5001], dtype=torch.bfloat16).float(), 64)
    assert torch.equal(embeddings[0], embeddings[1])  # bfloat16 cannot hold the difference,
    embeddings = timestep_embedding(torch.tensor([0.5, 0.5001]), 64)
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.5  # float32 must keep it


def test_global_response_norm_survives_float16():
    norm = GlobalResponseNorm(4).half()
    torch.nn.init.ones_(norm.gamma)
    x = torch.full((1, 8, 8, 4), 2000.0, dtype=torch.float16)
    assert torch.allclose(norm(x).float(), torch.full_like(x, 4000.0).float(), rtol=1e-2)


def formula_gradients(x, gamma, beta, along):
    """Gradients that PyTorch derives from the paper's formula, in float64; zero where a channel is zero everywhere."""
    x, gamma, beta = (t.detach().double().requires_grad_() for t in (x, gamma, beta))
    response = (x.square().sum(dim=(1, 2), keepdim=True) + 1e-300).sqrt()
    y = x + gamma * x * response / (response.mean(dim=-1, keepdim=True) + 1e-6) + beta
    return torch.autograd.grad(y, (x, gamma, beta), along.double())


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 999))
def test_global_response_norm_has_the_gradients_of_its_formula(batch, height, width, channels, zero, seed):
    generator = torch.Generator().manual_seed(seed)
    norm = GlobalResponseNorm(channels)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    x = torch.randn(batch, height, width, channels, generator=generator)
    if zero:
        x[0, :, :, 0] = 0
    along = torch.randn(x.shape, generator=generator)
    inputs = (x.requires_grad_(), norm.gamma, norm.beta)
    gradients = torch.autograd.grad(norm(x), inputs, along)
    for gradient, expected in zip(gradients, formula_gradients(*inputs, along), strict=True):
        assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_global_response_norm_passes_the_gradient_on():
    norm = GlobalResponseNorm(8)
    torch.nn.init.normal_(norm.gamma)
    x, along = torch.randn(2, 4, 4, 8, requires_grad=True), torch.randn(2, 4, 4, 8)
    expected = formula_gradients(x, norm.gamma, norm.beta, along)[0]
    norm.requires_grad_(False)
    norm(x).backward(along)
    assert torch.allclose(x.grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert norm.gamma.grad is None and norm.beta.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_response_norm_gives_gradients_in_the_type_of_what_they_belong_to(dtype):
    norm = GlobalResponseNorm(8).to(dtype)
    torch.nn.init.ones_(norm.gamma)
    x = torch.randn(2, 4, 4, 8, dtype=dtype, requires_grad=True)
    norm(x).float().square().mean().backward()
    for tensor in (x, norm.gamma, norm.beta):
        assert tensor.grad.dtype == dtype
        assert tensor.grad.float().abs().max() > 0


@pytest.mark.parametrize(
    ("build_it", "found"),
    [
        (lambda: StageC(nhead=[3, 32], c_hidden=[64, 64]), "3 attention heads"),
        (lambda: StageC(blocks=[[1], [1]], c_hidden=[64, 64]), "blocks is"),
        (lambda: StageC(level_config=["CX", "C"], c_hidden=[64, 64], blocks=[[1, 1], [1, 1]]), "'X'"),
        (lambda: StageC(switch_level=[True, True]), "switch_level has 2"),
        (lambda: ControlNet(bottleneck_mode="small"), "'small'"),
        (lambda: StageA(c_hidden=8).encode(torch.zeros(1, 3, 10, 8)), "8 x 10"),
        (lambda: small_stage_b()(torch.zeros(1, 4, 6, 5), torch.ones(1), torch.zeros(1, 16, 1, 1),
                                 torch.zeros(1, 1, 8)), "5 x 6"),
    ],
)  # fmt: skip
def test_refusals_say_what_was_found(build_it, found):
    with pytest.raises(ValueError, match=found):
        build_it()


def small_stage_b() -> StageB:
    return StageB(c_cond=16, c_hidden=[16, 16], nhead=[-1, 2], blocks=[[1, 1], [1, 1]],
                  block_repeat=None, level_config=["CT", "CTA"], dropout=0.0, c_clip=8)  # fmt: skip
