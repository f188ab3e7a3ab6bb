"""The quick ways through a network give what the plain ones do: autograd switches the quick ones off."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stable_cascade_nodes.cascade_ops.models import StageA, StageB, StageC, dense, in_place
from stable_cascade_nodes.cascade_ops.models.layers import FeedForwardBlock, ResBlock

STAGE_B = {
    "c_hidden": [8, 12, 16, 16],
    "nhead": [-1, -1, 2, 2],
    "blocks": [[1, 2, 1, 1], [1, 1, 2, 1]],
    "block_repeat": [[1, 1, 1, 1], [2, 1, 1, 2]],
    "c_cond": 24,
    "c_clip": 10,
}


@pytest.fixture
def narrow_strips(monkeypatch):
    """Strips of a few rows, and no hidden layer small enough to be made at once."""
    monkeypatch.setattr(in_place, "_FEWEST_POSITIONS", 1)
    monkeypatch.setattr(in_place, "_KEPT", 0)
    monkeypatch.setattr(in_place, "_FEW", 0)
    monkeypatch.setattr(in_place, "_STRIP", 3000)
    monkeypatch.setattr(in_place.strips, "__kwdefaults__", {"least": 1, "most": 3000})
    monkeypatch.setattr("stable_cascade_nodes.cascade_ops.models.stage_a._TAIL_STRIP", 3000)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def filled(module, scale=0.3):
    """Weights that leave nothing at zero, the response norms' and gates' included."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, scale, generator=generator)
    return module.eval().requires_grad_(False)


def both(run):
    """Results of the plain way and of the quick one."""
    with torch.enable_grad():
        plain = run()
    with torch.no_grad():
        return plain, run()


def assert_near(quick, plain, most=2e-5):
    assert quick.shape == plain.shape and quick.dtype == plain.dtype
    assert (quick - plain).abs().max() <= most * plain.abs().max()


def calls_of(monkeypatch, module, name):
    """Arguments of every call of a function of a module, which still does its work."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *arguments, **named: (calls.append(arguments), real(*arguments, **named))[1]
    )
    return calls


@pytest.mark.parametrize("shape", [(4200, 5), (2, 40, 60, 5), (1, 5000, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_matrix_product_by_convolution(two_threads, monkeypatch, shape, bias):
    monkeypatch.setattr(dense, "_ONE_DNN", torch.backends.mkldnn.is_available())
    convolutions = calls_of(monkeypatch, F, "conv2d")
    layer = filled(nn.Linear(5, 7, bias=bias))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_near(dense.linear(layer, x), x @ layer.weight.T + (0 if layer.bias is None else layer.bias), 1e-6)
    assert bool(convolutions) == torch.backends.mkldnn.is_available()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_weight_is_read_in_parts(two_threads, monkeypatch, bias):
    monkeypatch.setattr(dense, "_ONE_DNN", True)
    monkeypatch.setattr(dense, "_WEIGHT_AT_ONCE", 1000)
    convolutions = calls_of(monkeypatch, F, "conv2d")
    layer = filled(nn.Linear(5, 150, bias=bias))  # 3000 bytes
    x = torch.randn(2, 2100, 5, generator=torch.Generator().manual_seed(1))
    expected, memory = F.linear(x, layer.weight, layer.bias), torch.full((2, 2100, 150), torch.nan)
    with torch.no_grad():
        assert_near(dense.linear(layer, x), expected, 1e-6)
        assert [len(call[1]) for call in convolutions] == [64, 64, 22]
        assert dense.linear(layer, x, lambda: memory) is memory
    assert_near(memory, expected, 1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_whose_weights_are_read_in_parts(two_threads, monkeypatch, batch):
    monkeypatch.setattr(dense, "_ONE_DNN", True)
    monkeypatch.setattr(dense, "_WEIGHT_AT_ONCE", 3000)
    block = filled(FeedForwardBlock(24))  # 9216 bytes in either matrix
    x = torch.randn(batch, 60, 60, 24, generator=torch.Generator().manual_seed(2))
    plain, workspace = block(x.clone()), in_place.Workspace()
    given = x.clone()
    with torch.no_grad():
        taken = calls_of(monkeypatch, workspace, "take")
        assert block(given, workspace) is given
    assert_near(given, plain)
    assert [call[:2] for call in taken] == [(batch * 3600, 96)]


@pytest.mark.parametrize("case", ["few numbers", "one thread", "autograd", "bfloat16", "no oneDNN"])
def test_plain_matrix_product_where_the_other_does_not_pay(two_threads, monkeypatch, case):
    monkeypatch.setattr(dense, "_ONE_DNN", case != "no oneDNN")
    if case == "one thread":
        torch.set_num_threads(1)
    convolutions = calls_of(monkeypatch, F, "conv2d")
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    layer = filled(nn.Linear(5, 7)).to(dtype)
    x = torch.randn(4000 if case == "few numbers" else 4200, 5).to(dtype)
    with torch.set_grad_enabled(case == "autograd"):
        assert torch.equal(dense.linear(layer, x), F.linear(x, layer.weight, layer.bias))
    assert not convolutions


def test_layers_that_are_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = filled(Doubled(5, 7))
    x = torch.randn(80, 5)
    assert dense.at_hand(layer) is None
    assert torch.equal(dense.linear(layer, x), 2 * F.linear(x, layer.weight, layer.bias))
    layer.at_hand = lambda: (2 * layer.weight, 2 * layer.bias)
    assert_near(dense.linear(layer, x), 2 * F.linear(x, layer.weight, layer.bias), 1e-6)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 13),
    width=st.integers(1, 9),
    skip=st.booleans(),
    kernel=st.sampled_from([1, 3, 5]),
    strip=st.sampled_from([400, 2000, 1 << 20]),
)
def test_residual_block_in_strips(batch, height, width, skip, kernel, strip):
    block = filled(ResBlock(6, 4 if skip else 0, kernel))
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, height, width, 6, generator=generator)
    joined = torch.randn(batch, height, width, 4, generator=generator) if skip else None
    plain = block(x.clone(), joined)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(in_place, "_FEWEST_POSITIONS", 1)
        patch.setattr(in_place, "_KEPT", 0)
        patch.setattr(in_place, "_FEW", 0)
        patch.setattr(in_place.strips, "__kwdefaults__", {"least": 1, "most": strip})
        given = x.clone()
        quick = block(given, joined, in_place.Workspace())
    assert quick is given
    assert_near(quick, plain)


@pytest.mark.parametrize("rows", [1, 40])
def test_response_norm_goes_into_the_weight_where_rows_are_many(monkeypatch, rows):
    folded = calls_of(monkeypatch, in_place, "_folded")
    block = filled(FeedForwardBlock(3))
    before = [parameter.clone() for parameter in block.parameters()]
    x = torch.randn(1, rows, 2, 3)
    plain = block(x.clone())
    with torch.no_grad():
        assert_near(block(x.clone(), in_place.Workspace()), plain)
    assert len(folded) == (rows > 1)
    assert all(torch.equal(now, then) for now, then in zip(block.parameters(), before, strict=True))


def test_workspace_is_shared():
    workspace, like = in_place.Workspace(), torch.zeros(1)
    first = workspace.take(6, 4, like)
    assert workspace.take(3, 5, like).data_ptr() == first.data_ptr()
    assert workspace.take(7, 4, like).shape == (7, 4)
    assert workspace.take(2, 2, like.double()).dtype == torch.float64


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_stage_b(request, two_threads, narrow, batch):
    if narrow:
        request.getfixturevalue("narrow_strips")
    model = filled(StageB(**STAGE_B))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, 36, 28, generator=generator)
    prior, clip = torch.randn(batch, 16, 5, 4, generator=generator), torch.randn(batch, 10, generator=generator)
    prepared = model.prepare(torch.tensor([0.7, 0.2]), prior, clip, (36, 28))
    given = [x, prepared.added, *prepared.modulations, *prepared.key_values]
    before = [tensor.clone() for tensor in given]
    plain, quick = both(lambda: model.step(x, prepared, 1))
    assert_near(quick, plain)
    # What is prepared serves every step.
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.parametrize("letters", ["CTA", "CTAF"])
def test_stage_c(two_threads, letters):
    model = StageC(
        c_cond=24,
        c_hidden=[16, 24],
        nhead=[2, 3],
        blocks=[[1, 2], [2, 1]],
        level_config=[letters, letters],
        c_clip_text=10,
        c_clip_text_pooled=10,
        c_clip_img=6,
        switch_level=[True],
    )
    model = filled(model)
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 16, 11, 10, generator=generator), torch.randn(2, 5, 10, generator=generator)
    control = [torch.randn(2, 16, 4, 4, generator=generator), None, torch.randn(1, 24, 3, 2, generator=generator)]
    before = [tensor.clone() for tensor in control if tensor is not None]
    prepared = model.prepare(torch.tensor([0.4]), text, text[:, 0], torch.zeros(2, 6))
    plain, quick = both(lambda: model.step(x, prepared, 0, control))
    assert_near(quick, plain)
    assert all(torch.equal(now, then) for now, then in zip(filter(torch.is_tensor, control), before, strict=True))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_stage_a(request, two_threads, levels, batch):
    request.getfixturevalue("narrow_strips")
    model = filled(StageA(levels=levels, bottleneck_blocks=2, c_hidden=16, codebook_size=4))
    generator = torch.Generator().manual_seed(4)
    latent = torch.randn(batch, 4, 19, 9, generator=generator)
    before = latent.clone()
    assert_near(*reversed(both(lambda: model.decode(latent))))
    assert torch.equal(latent, before)
    side = model.compression
    image = torch.rand(batch, 3, 11 * side, 7 * side, generator=generator)
    before = image.clone()
    assert_near(*reversed(both(lambda: model.encode(image)[0])))
    assert torch.equal(image, before)


def test_a_large_picture_needs_the_memory_of_its_latents_level(narrow_strips):
    """The last level, twice as large, is made in strips: no tensor of it has the whole height."""
    model = filled(StageA(bottleneck_blocks=1, c_hidden=16, codebook_size=4))
    heights = []
    model.up_blocks[-2].register_forward_hook(lambda layer, given, made: heights.append(made.shape[2]))
    with torch.no_grad():
        model.decode(torch.randn(1, 4, 80, 8))
    assert max(heights) <= 160 // 3 and sum(heights) >= 160
