"""Stage A in tiles against Stage A as a whole."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import randomised
from hypothesis import assume, given
from hypothesis import strategies as st
from memory_kit import Peak

from stable_cascade_nodes.cascade_ops import memory, stages, tiles
from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.models import StageA
from stable_cascade_nodes.cascade_ops.wires import Latent

CONFIGS = {
    "published depth": {"c_hidden": 16},
    "shallow": {"c_hidden": 8, "bottleneck_blocks": 3},
    "three levels": {"levels": 3, "c_hidden": 16, "bottleneck_blocks": 2},
    "one level": {"levels": 1, "c_hidden": 8, "bottleneck_blocks": 2},
}


@pytest.fixture(scope="module")
def tiny():
    return load_stage(bundled("stage_a").path, "stage_a")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def psnr(found, wanted):
    peak = (wanted.max() - wanted.min()).item()
    return 10 * math.log10(peak**2 / max((found - wanted).square().mean().item(), 1e-20))


# Reach -------------------------------------------------------------------------------------------------------------


def spread(run, base, cells, scale_in, scale_out):
    """How many cells of the output around the middle one change when the middle cell of the input does."""
    middle = cells // 2
    changed = base.clone()
    part = slice(middle * scale_in, (middle + 1) * scale_in)
    changed[..., part, part] += 1
    rows = ((run(base) - run(changed)) != 0).any(1)[0].any(1).nonzero()[:, 0] // scale_out
    return max(middle - rows.min().item(), rows.max().item() - middle)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reach_is_what_an_impulse_touches(name):
    model = randomised(StageA(**CONFIGS[name]), 1).double()
    scale = model.compression
    with torch.no_grad():
        reach = tiles.decoding_reach(model)
        cells = 2 * reach + 5
        touched = spread(model.decode, noise(1, 4, cells, cells).double(), cells, 1, scale)
        assert touched <= reach <= touched + 1
        reach = tiles.encoding_reach(model)
        cells = 2 * reach + 5
        image = noise(1, 3, cells * scale, cells * scale).double()
        assert spread(lambda x: model.encode(x)[0], image, cells, scale, 1) == reach


def test_the_published_reach():
    model = StageA(c_hidden=16)
    assert (tiles.decoding_reach(model), tiles.encoding_reach(model)) == (14, 2)


# Tiles -------------------------------------------------------------------------------------------------------------


@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), tile=st.integers(4, 1400), reach=st.integers(0, 20))
def test_tiles_cover_every_cell_once(size, tile, reach):
    assume(
        size[0] * size[1] <= 4000 * (tile // 4) ** 2
    )  # tens of thousands of tiles show nothing that thousands do not
    covered = torch.zeros(size, dtype=torch.int)
    found = list(tiles.tiles_of(size, tile, reach))
    for kept, seen in found:
        covered[kept] += 1
        for part, around, length in zip(kept, seen, size, strict=True):
            assert 0 <= part.start < part.stop <= length and part.stop - part.start <= max(1, tile // 4)
            assert around.start == max(0, part.start - reach) and around.stop == min(length, part.stop + reach)
    assert (covered == 1).all()
    assert len(found) == tiles.tile_count(size, tile)
    largest = tiles.largest_tile(size, tile, reach)
    assert largest == tuple(max(seen[axis].stop - seen[axis].start for _, seen in found) for axis in (0, 1))


def test_no_tile_is_the_whole_picture():
    assert list(tiles.tiles_of((30, 50), 0, 14)) == [((slice(0, 30), slice(0, 50)),) * 2]
    assert tiles.tile_count((30, 50), 0) == 1
    for tile in (3, -64):
        with pytest.raises(ValueError, match=rf"A tile of {tile} pixels was asked for, expected 0 .* at least 4"):
            tiles.tile_count((30, 50), tile)


# Cells: smaller than a tile, of several tiles, and no multiples of one.
SIZES = [(9, 7), (16, 16), (33, 50), (70, 21)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiny_stage_a_in_tiles_is_the_whole_picture(tiny, size):
    latent = noise(2, 4, *size)
    with torch.no_grad():
        whole = tiny.module.decode(latent)
        tiled = tiles.tiled_decode(tiny.module, latent, 64)
        assert psnr(tiled, whole) > 100 and (tiled - whole).abs().max() < 1e-4
        image = noise(2, 3, size[0] * 4, size[1] * 4, seed=1).sigmoid()
        whole = tiny.module.encode(image)[0]
        tiled = tiles.tiled_encode(tiny.module, image, 64)
        assert psnr(tiled, whole) > 100 and (tiled - whole).abs().max() < 1e-4


def test_stage_a_of_the_published_size_in_tiles_is_the_whole_picture():
    model = randomised(StageA(), 2)
    latent = noise(1, 4, 40, 12)
    with torch.no_grad():
        whole = model.decode(latent)
        assert whole.std() > 1e-3
        assert psnr(tiles.tiled_decode(model, latent, 64), whole) > 100
        image = noise(1, 3, 160, 48).sigmoid()
        assert psnr(tiles.tiled_encode(model, image, 64), model.encode(image)[0]) > 100


def test_bfloat16_stays_far_above_what_can_be_seen(tiny):
    model = StageA(**tiny.info.config)
    model.load_state_dict(tiny.module.state_dict())
    model = model.bfloat16().eval()
    latent = noise(1, 4, 40, 40)
    with torch.no_grad():
        assert psnr(tiles.tiled_decode(model, latent, 64), model.decode(latent).float()) > 45


def test_sizes_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match="A picture of 66 x 64 was given, expected multiples of 4"):
        tiles.tiled_encode(tiny.module, torch.zeros(1, 3, 64, 66), 64)


# The stage -----------------------------------------------------------------------------------------------------------


def test_decoding_in_tiles_crops_and_counts(handles):
    stage_a = handles["stage_a"]
    latent = Latent(noise(2, 4, 16, 26), width=100, height=60)
    whole = stages.decode_stage_a(stage_a, latent)
    done, alone = [], []
    tiled = stages.decode_stage_a(stage_a, latent, done.append, tile=32)
    assert tiled.shape == whole.shape == (2, 60, 100, 3)
    assert (tiled - whole).abs().max() < 1e-5
    assert done == list(range(1, 2 * tiles.tile_count((16, 26), 32) + 1)) and len(done) == 16
    assert torch.equal(stages.decode_stage_a(stage_a, latent, alone.append, tile=4096), whole)
    assert alone == [1, 2]


def test_a_tile_can_end_the_run(handles):
    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.decode_stage_a(handles["stage_a"], Latent(noise(1, 4, 16, 26)), stop, tile=32)


def test_memory_is_that_of_a_tile(tiny):
    config = {**tiny.info.config, "c_hidden": 128}
    wide = replace(tiny, module=randomised(StageA(**config), 3))
    latent = noise(1, 4, 160, 160)
    for tile in (128, 0):
        peak = Peak(wide.module)
        peak.alive.add(latent.untyped_storage()._cdata)
        with torch.no_grad(), peak:
            picture = tiles.tiled_decode(wide.module, latent, tile)
        estimate = memory.decoding_bytes(wide, latent.shape, tile, on_cpu=True)
        assert 1 < estimate / (peak.most - picture.untyped_storage().nbytes()) < 1.5, tile
    assert estimate / memory.decoding_bytes(wide, latent.shape, 128, on_cpu=True) > 2.5
