"""Stage B and Stage A in float16 at the number of positions of a picture of 2048 pixels: finite, and near float32.

What could leave float16's range there and not in a small picture is what is summed over positions: the global response
norm over 256 x 256 tokens (65,536 squares), attention over 64 x 64 of them. Few channels, so that it is quick.
"""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import randomised

from stable_cascade_nodes.benchmarks.half_precision import errors
from stable_cascade_nodes.cascade_ops import stages
from stable_cascade_nodes.cascade_ops.models import StageA, StageB
from stable_cascade_nodes.cascade_ops.models.in_place import Workspace
from stable_cascade_nodes.cascade_ops.models.layers import Attention, GlobalResponseNorm, ResBlock
from stable_cascade_nodes.cascade_ops.tiles import tiled_decode, tiled_encode

LARGEST = torch.finfo(torch.float16).max


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half(module):
    return copy.deepcopy(module).half()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("side", [256, 512])
def test_a_response_beyond_float16(side, in_place):
    """Hidden activations of thousands give a norm over the picture of millions, and of billions before the root."""
    block = randomised(ResBlock(8), 3)
    with torch.no_grad():
        block.channelwise[0].weight.mul_(2000)
        block.channelwise[4].weight.div_(2000)
        hidden = []
        block.channelwise[1].register_forward_hook(lambda layer, taken, out: hidden.append(out))
        x = noise(1, side, side, 8)
        exact = block(x)
        response = torch.linalg.vector_norm(hidden[0], dim=(1, 2)).max()
        assert hidden[0].abs().max() < LARGEST / 2 < LARGEST * 2 < response
        ours = half(block)(x.half(), None, Workspace() if in_place else None)
    assert ours.dtype == torch.float16
    largest, usual = errors(ours, exact)
    assert largest < 0.005 and usual < 0.0005


def large_stage_b():
    """All four levels of the release, a few channels wide, with a stream of thousands and sharp attention."""
    model = randomised(
        StageB(
            c_cond=16,
            c_hidden=(8, 8, 16, 16),
            nhead=(-1, -1, 2, 2),
            blocks=((1, 1, 1, 1), (1, 1, 1, 1)),
            block_repeat=((1, 1, 1, 1), (2, 1, 1, 1)),
            c_clip=16,
            dropout=0.0,
        ),
        5,
    )
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, GlobalResponseNorm):
                norm.gamma.mul_(4)
        for block, factor in ((model.down_blocks[0][0], 500), (model.up_blocks[-1][0], 10)):
            block.channelwise[-1].weight.mul_(factor)
    return model


def test_stage_b_at_2048():
    model = large_stage_b()
    given = noise(1, 4, 512, 512), torch.tensor([0.4]), noise(1, 16, 48, 48), noise(1, 1, 16)
    peaks = []
    for block in (*model.down_blocks[0], *model.up_blocks[-1]):
        block.register_forward_hook(lambda block, taken, x: peaks.append(x.abs().max()))
    with torch.no_grad():
        exact = model(*given)
        ours = half(model)(*given)
    assert 1e4 < max(peaks) < LARGEST
    largest, usual = errors(ours, exact)
    assert largest < 0.05 and usual < 0.001


def test_attention_scores_beyond_float16():
    """Queries times keys are kept in more than float16: only the share that each token gets goes on."""
    attention = randomised(Attention(64, 2), 7)
    with torch.no_grad():
        attention.in_proj_weight[:128].mul_(150)
        tokens, key_value = noise(1, 4096, 64), noise(1, 5, 128)
        query, key = attention.project(tokens, slice(0, 2)).split(64, dim=-1)
        score = (query[..., :32] @ key[..., :32].transpose(1, 2)).abs().max()
        assert score > 2 * LARGEST and max(query.abs().max(), key.abs().max()) < LARGEST / 2
        ours = half(attention)(tokens.half(), key_value.half(), True)
        exact = attention(tokens, key_value, True)
    # Where two tokens are about as near, which one is read is decided by the rounding: few are off, none is lost.
    assert ours.isfinite().all()
    assert ((ours - exact).abs() < 0.01 * exact.abs().max()).float().mean() > 0.9


@pytest.fixture(scope="module")
def stage_a():
    """A narrow Stage A with gates of the size of ones, where the published ones let less through."""
    model = randomised(StageA(bottleneck_blocks=2, c_hidden=16, codebook_size=8), 9)
    with torch.no_grad():
        for name, gates in model.named_parameters():
            if name.endswith("gammas"):
                gates.copy_(torch.tensor([0.5, -0.5, 1.0, 2.0, 1.0, -1.0]))
    return model


@pytest.mark.parametrize("tile", [0, 128])
def test_stage_a_decodes(stage_a, tile):
    """Of any size: a pixel depends on a few cells around it, which is why tiles give the same."""
    latent = noise(1, 4, 48, 64) * 3
    largest, usual = errors(tiled_decode(half(stage_a), latent, tile), tiled_decode(stage_a, latent))
    assert largest < 0.02 and usual < 0.002


def test_stage_a_encodes(stage_a):
    image = noise(1, 3, 192, 256).mul(0.3).add(0.5).clamp(0, 1)
    model = copy.deepcopy(stage_a)
    norm = model.down_blocks[-1][1]
    norm.running_mean.fill_(0.7)
    norm.running_var.fill_(30.0)
    largest, usual = errors(tiled_encode(half(model), image, 128), tiled_encode(model, image, 1024))
    assert largest < 0.02 and usual < 0.002


def test_a_picture_that_is_not_finite_is_refused(handles):
    handle = handles["stage_a"]
    spoilt = copy.deepcopy(handle.module)
    with torch.no_grad():
        spoilt.out_block[0].weight.mul_(1e8)
    latent = stages.Latent(noise(1, 4, 16, 16))
    assert stages.decode_stage_a(handle, latent).isfinite().all()
    with pytest.raises(ValueError, match="Stage A gave a picture with NaN or infinite values"):
        stages.decode_stage_a(replace(handle, module=spoilt.half()), latent)
