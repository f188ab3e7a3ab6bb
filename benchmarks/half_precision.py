"""How far float16 is from float32, with random weights of the published shapes: the figures of float16.md.

    python -m stable_cascade_nodes.benchmarks.half_precision [stage_c] [stage_b] [stage_a] [--side 512] [--width 384]

Everything runs on the CPU, which is slow in float16 but rounds and overflows as float16 does everywhere. Errors are the
largest and the root mean square difference from float32, both over the largest value of the float32 result.

`stage_c` makes Stage C (`--width` channels, a level of eight groups of blocks last, as in the release) whose residual
stream grows in its last level until it leaves float16's range, evenly or in a few channels, and compares ways to keep
it there. `stage_b` runs one step of the published lite model for a picture of `--side` pixels, `stage_a`
decodes a picture of that side with the published width, in tiles of 512. bfloat16 is there to compare with.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cascade_ops import float16
from ..cascade_ops.models import StageA, StageB, StageC
from ..cascade_ops.models.layers import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock, as_channels_last, as_image
from ..cascade_ops.models.layers import layer_norm as normalised
from ..cascade_ops.sizes import stage_b_size, stage_c_size
from ..cascade_ops.tiles import tiled_decode

SCALES = (16.0, 64.0, 256.0, 1024.0)
_LITE_B: dict[str, Any] = {
    "c_hidden": [320, 576, 1152, 1152],
    "nhead": [-1, 9, 18, 18],
    "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
}
_TILE = 512


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """All weights random, of the size that keeps activations about as large as they come in; gates and norms small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            fan = weight[0].numel() if weight.ndim > 1 else 1
            size = 0.1 if weight.ndim == 1 or "gamma" in name or "beta" in name else fan**-0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    return module.eval().requires_grad_(False)


def growing_stage_c(width: int = 384, peak: float = 1e6, channels: int = 0, seed: int = 0, groups: int = 8) -> StageC:
    """Stage C whose residual stream in the last level grows, group by group, to about `peak`.

    channels: how many of them grow; 0 is all. Without growth the stream would reach about 10.
    """
    model = StageC(
        c_cond=128,
        c_hidden=(width, width),
        nhead=(width // 32, width // 32),
        blocks=((1, 2), (2, groups)),
        c_clip_text=64,
        c_clip_text_pooled=64,
        c_clip_img=64,
        dropout=0.0,
    )
    randomised(model, seed)
    growing = slice(None) if channels == 0 else slice(0, channels)
    blocks = [block for block in model.up_blocks[-1] if not isinstance(block, TimestepBlock)]
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            out = block.attention["attn"].out_proj if isinstance(block, AttnBlock) else block.channelwise[-1]
            factor = (peak / 10) ** (number / len(blocks))
            out.weight[growing] *= factor
            out.bias[growing] *= factor
        for block in model.blocks_of(TimestepBlock):
            for mapper in block.children():
                mapper.weight *= 0.1
    return model


def conditions(model: StageC, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """A latent and texts for `StageC.forward`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    width = model.clip_txt_mapper.in_features
    return {
        "x": draw(16, 16, 16),
        "r": torch.linspace(0.2, 0.9, batch),
        "clip_text": draw(8, width),
        "clip_text_pooled": draw(1, width),
        "clip_img": draw(1, width),
    }


class _DividedActivations(nn.Module):
    """A linear layer that divides what comes in instead of its weight; its bias is divided."""

    def __init__(self, layer: nn.Linear, scale: float):
        super().__init__()
        self.in_features = layer.in_features
        self.weight, self.bias, self.scale = layer.weight, nn.Parameter(layer.bias / scale, False), scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x / self.scale, self.weight, self.bias)


class _WideResBlock(ResBlock):
    """A residual block in float16 on a stream in float32."""

    def forward(self, x: Tensor, skip: Tensor | None = None, workspace: Any = None) -> Tensor:
        x, conv = x.float(), self.depthwise
        bias = conv.bias.float()
        hidden = F.conv2d(as_image(x), conv.weight.float(), bias, padding=conv.padding, groups=conv.groups)
        hidden = normalised(as_channels_last(hidden), self.stream_scale).half()
        if skip is not None:
            hidden = torch.cat([hidden, skip], dim=-1)
        return x + self.channelwise(hidden)


class _WideAttnBlock(AttnBlock):
    """An attention block in float16 on a stream in float32."""

    last = False

    def forward(self, x: Tensor, key_value: Tensor, decoupled: Any = (), workspace: Any = None) -> Tensor:
        tokens = normalised(x, self.stream_scale).half().flatten(1, 2)
        x = x + self.attention["attn"](tokens, key_value, self.self_attn, decoupled).view_as(x)
        return x.half() if self.last else x


def with_wide_stream(model: StageC) -> StageC:
    """A rescaled model in float16, its last level's stream in float32; changes the model."""
    blocks = list(model.up_blocks[-1])
    for block in blocks:
        block.__class__ = {ResBlock: _WideResBlock, AttnBlock: _WideAttnBlock}.get(type(block), type(block))
    blocks[-1].last = True
    return model


def with_divided_activations(model: StageC, scale: float) -> StageC:
    """The model in float16, rescaled but for the branches' last layers, which divide what comes in."""
    result = float16.rescaled(model, scale, torch.float16)
    plain = {name: weight.half() for name, weight in model.named_parameters()}
    for number, block in enumerate(result.up_blocks[-1]):
        prefix = f"up_blocks.{len(result.up_blocks) - 1}.{number}"
        if isinstance(block, ResBlock | FeedForwardBlock):
            own = model.get_submodule(f"{prefix}.channelwise.4")
            block.channelwise[-1] = _DividedActivations(own, scale).half()
            block.channelwise[-1].weight = nn.Parameter(plain[f"{prefix}.channelwise.4.weight"], False)
        elif isinstance(block, AttnBlock):
            own = model.get_submodule(f"{prefix}.attention.attn.out_proj")
            block.attention["attn"].out_proj = _DividedActivations(own, scale).half()
    return result


def peak_of_stream(model: StageC, given: dict[str, Tensor]) -> float:
    """The largest value in the stream of the last level."""
    peaks: list[float] = []
    hooks = [
        block.register_forward_hook(lambda block, taken, x: peaks.append(x.abs().max().item()))
        for block in model.up_blocks[-1]
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return max(peaks)


def errors(ours: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference over the largest exact value; infinite where ours is not finite."""
    if not ours.isfinite().all():
        return math.inf, math.inf
    off = (ours.double() - exact.double()) / exact.double().abs().max()
    return off.abs().max().item(), off.square().mean().sqrt().item()


def ways(model: StageC) -> Iterator[tuple[str, StageC]]:
    """The ways to run Stage C in 16 bits that are compared."""
    yield "bfloat16", copy.deepcopy(model).bfloat16()
    yield "float16", copy.deepcopy(model).half()
    for scale in SCALES:
        yield f"float16, weights / {scale:g}", float16.rescaled(model, scale, torch.float16)
    scale = float16.SCALE
    yield f"float16, activations / {scale:g}", with_divided_activations(model, scale)
    wide = float16.rescaled(model, scale, torch.float16)
    yield f"float16, weights / {scale:g}, stream float32", with_wide_stream(wide)


def measure_stage_c(width: int) -> list[dict[str, Any]]:
    """Each way for a stream that stays small, one that grows evenly and one that grows in three channels."""
    rows = []
    for title, peak, channels in (("small", 1e2, 0), ("all channels grow", 1e6, 0), ("three channels grow", 1e6, 3)):
        model = growing_stage_c(width, peak, channels)
        given = conditions(model)
        stream = peak_of_stream(model, given)
        with torch.no_grad():
            exact = model(**given)
            for name, other in ways(model):
                row = {"case": f"Stage C, {title}, stream up to {stream:.3g}", "way": name}
                rows.append(_measured(row, partial(other, **given), exact))
    return rows


def measure_stage_b(side: int) -> list[dict[str, Any]]:
    """One step of the published lite model for a picture of `side` pixels."""
    model = randomised(StageB(**_LITE_B))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, *stage_b_size(side, side), generator=generator)
    effnet = torch.randn(1, 16, *stage_c_size(side, side), generator=generator)
    given = x, torch.tensor([0.5]), effnet, torch.randn(1, 1, 1280, generator=generator)
    with torch.no_grad():
        exact = model(*given)
        return [
            _measured({"case": f"Stage B lite, {side} pixels", "way": name}, partial(other, *given), exact)
            for name, other in _both(model)
        ]


def measure_stage_a(side: int) -> list[dict[str, Any]]:
    """The published width, decoding a picture of `side` pixels in tiles."""
    model = randomised(StageA())
    latent = torch.randn(1, 4, side // 4, side // 4, generator=torch.Generator().manual_seed(1))
    exact = tiled_decode(model, latent, _TILE)
    return [
        _measured({"case": f"Stage A, {side} pixels", "way": name}, partial(tiled_decode, other, latent, _TILE), exact)
        for name, other in _both(model)
    ]


def _both(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "bfloat16", copy.deepcopy(model).bfloat16()
    yield "float16", copy.deepcopy(model).half()


def _measured(row: dict[str, Any], run: Callable[[], Tensor], exact: Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    largest, usual = errors(run(), exact)
    row |= {"largest": largest, "rms": usual, "seconds": time.perf_counter() - start}
    print(f"{row['case']:55} {row['way']:40} {largest:9.2e} {usual:9.2e} {row['seconds']:8.1f} s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="stage_c, stage_b, stage_a; all of them where none is named")
    parser.add_argument("--side", type=int, nargs="+", default=[512], help="sides of the picture in pixels")
    parser.add_argument("--width", type=int, default=384, help="channels of Stage C, a multiple of 32")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    known = ("stage_c", "stage_b", "stage_a")
    if unknown := set(given.parts) - set(known):
        parser.error(f"{sorted(unknown)[0]} is unknown: choose from {', '.join(known)}.")
    parts = given.parts or known
    print(f"{'case':55} {'way':40} {'largest':>9} {'rms':>9} {'time':>10}")
    rows = measure_stage_c(given.width) if "stage_c" in parts else []
    for side in given.side:
        rows += measure_stage_b(side) if "stage_b" in parts else []
        rows += measure_stage_a(side) if "stage_a" in parts else []
    if given.json:
        # JSON has no infinity: a result that was not finite has no error.
        finite = [{key: None if value == math.inf else value for key, value in row.items()} for row in rows]
        given.json.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
