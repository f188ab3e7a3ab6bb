"""Stage C in float16: its last level with the residual stream divided, so that it stays in float16's range.

In the last level of the published Stage C of 3.6B (``up_blocks.1``) the residual stream grows beyond 65504, the largest
number of float16, and the picture is black. What the level computes does not depend on the scale of that stream: every
branch reads it through a layer norm, and so does the output. So the stream may be kept divided by a number `s`,

    x -> x / s,

if everything that is added to it is divided too. Path by path, with x' = x / s in place of x:

* The stream comes in through the upscaler's 1x1 convolution (behind a layer norm, and a bilinear enlargement, which
  is linear): weight and bias / s. Enlarging it to the size of the skip is linear too.
* Residual block: the depthwise convolution reads x' and its bias must shrink with it (/ s): D(x / s) + b / s is
  (D(x) + b) / s, and the layer norm behind it takes the s away. The skip joins behind that norm and stays. The MLP's
  last layer, weight and bias / s, adds to the stream. The global response norm inside the MLP never sees the stream.
* ControlNets add their residuals to the stream before residual blocks: / s (`unet.CascadeUNet.step`).
* Timestep block: x (1 + a) + b becomes x' (1 + a) + b / s: the second half (shift) of every mapper, rows of the weight
  and bias, / s; the first half (scale) stays.
* Attention block: a layer norm, then attention, whose output projection, weight and bias / s, adds to the stream. What
  IP-Adapters add comes before that projection.
* Feed-forward block: a layer norm, then an MLP whose last layer is divided as above.
* Repeats of a level have a 1x1 convolution of the stream between them: it reads x', so only its bias / s.
* The output's 1x1 convolution stands behind a layer norm and stays.
* A layer norm divides by sqrt(variance + eps); for x' the variance is 1 / s^2 of it, so eps / s^2 gives the same. The
  blocks and the network know `stream_scale` for that.

With s a power of two, every product and sum has the same digits and another exponent, so that the result is the same
to the last bit wherever nothing leaves the range of the type. How `SCALE` was chosen: docs/performance/float16.md.
The idea of a stream of another scale: KBlueLeaf, "Stable-Cascade FP16 fix" (2024), which changes the timestep blocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checkpoints.errors import shown
from .models.layers import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock
from .models.unet import CascadeUNet

if TYPE_CHECKING:
    from .checkpoints import FileInfo

# Streams of up to 64 * 65504 = 4 million fit, and weights of usual size stay above float16's subnormal numbers.
SCALE = 64.0

# The published Stage C of 3.6B leaves float16's range; the lite one of 1B does not.
_OVERFLOWING_PARAMETERS = 2_000_000_000


def overflows(info: FileInfo) -> bool:
    """Whether a model is of the size whose activations leave the range of float16: Stage C of 3.6B."""
    return info.stage == "stage_c" and info.parameters > _OVERFLOWING_PARAMETERS


def divided(model: CascadeUNet) -> dict[str, slice]:
    """Which rows of which parameters are divided, by the parameter's name, see above.

    Raises:
        ValueError: the network has one level, into which no layer leads that could be divided.
    """
    if len(model.up_blocks) < 2:
        raise ValueError(
            f"The network has {len(model.up_blocks)} level, expected at least two: only the last of several levels "
            "can be rescaled for float16; run it in bfloat16 or float32."
        )
    last = len(model.up_blocks) - 1
    rows: dict[str, slice] = {}

    def whole(prefix: str, layer: nn.Module) -> None:
        rows.update({f"{prefix}.{name}": slice(None) for name, _ in layer.named_parameters()})

    whole(f"up_upscalers.{last - 1}", model.up_upscalers[last - 1])
    for number, _ in model.get_submodule(f"up_repeat_mappers.{last}").named_children():
        rows[f"up_repeat_mappers.{last}.{number}.bias"] = slice(None)
    for number, block in _last_level(model):
        prefix = f"up_blocks.{last}.{number}"
        if isinstance(block, ResBlock | FeedForwardBlock):
            whole(f"{prefix}.channelwise.{len(block.channelwise) - 1}", block.channelwise[-1])
        if isinstance(block, ResBlock):
            rows[f"{prefix}.depthwise.bias"] = slice(None)
        elif isinstance(block, AttnBlock):
            whole(f"{prefix}.attention.attn.out_proj", block.get_submodule("attention.attn.out_proj"))
        elif isinstance(block, TimestepBlock):
            for name, weight in block.named_parameters():
                rows[f"{prefix}.{name}"] = slice(len(weight) // 2, None)
    return rows


def _last_level(model: CascadeUNet) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of the last level with their numbers."""
    return model.get_submodule(f"up_blocks.{len(model.up_blocks) - 1}").named_children()


def mark(model: CascadeUNet, scale: float) -> None:
    """Tell a network of its own (not one on a wire) and its last level what their stream is divided by.

    Raises:
        ValueError: `scale` is no power of two from 1 on.
    """
    _check_scale(scale)
    model.stream_scale = scale
    for _, block in _last_level(model):
        block.stream_scale = scale  # type: ignore[assignment]


def _check_scale(scale: float) -> None:
    if scale < 1 or not math.log2(scale).is_integer():
        raise ValueError(f"The scale is {scale}, expected a power of two from 1 on: other numbers change the digits.")


def scale_of(module: object) -> float:
    """What the stream of a model's last level is divided by; 1 for every model that was not rescaled."""
    return getattr(module, "stream_scale", 1.0)


def scaled_rows(tensor: Tensor, rows: slice | None, factor: float) -> Tensor:
    """A tensor in float32 with some of its rows multiplied (None: none of them); `tensor` itself stays as it is."""
    if rows is None:
        return tensor.float()
    tensor = tensor.to(torch.float32, copy=True)
    tensor[rows] *= factor
    return tensor


@torch.no_grad()
def rescaled(model: CascadeUNet, scale: float = SCALE, dtype: torch.dtype | None = None) -> CascadeUNet:
    """The same network with the stream of its last level divided by `scale` and its weights in `dtype`.

    `model` stays as it is; weights that do not change share their memory. dtype: None keeps that of each weight.

    Raises:
        ValueError: `scale` is no power of two, the network has one level, or it is rescaled already.
    """
    if scale_of(model) != 1:
        raise ValueError(f"The network is rescaled by {scale_of(model)} already, expected one as it was published.")
    _check_scale(scale)
    rows = divided(model)
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        changed = parameter.detach()
        if name in rows:
            changed = scaled_rows(changed, rows[name], 1 / scale)
        memo[id(parameter)] = nn.Parameter(changed.to(dtype or parameter.dtype), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    # deepcopy takes what the memo already holds instead of copying it.
    result = copy.deepcopy(model, memo)
    mark(result, scale)
    return result


def float16_weights(info: FileInfo, *, rescale: bool) -> Callable[[nn.Module], Callable[[str, Tensor], Tensor]]:
    """How `checkpoints.load` makes a model's weights float16, one at a time, from those of its file.

    info: of the file, for messages. rescale: divide the stream of the last level by `SCALE`. The result takes the
    module without its weights, marks it, and gives the function from a tensor's name and values in the file's dtype to
    what the module gets; that one raises ValueError for values that are not finite in float16.
    """

    def for_module(module: nn.Module) -> Callable[[str, Tensor], Tensor]:
        rows: dict[str, slice] = {}
        if rescale and isinstance(module, CascadeUNet):
            rows = divided(module)
            mark(module, SCALE)

        def converted(name: str, tensor: Tensor) -> Tensor:
            half = (scaled_rows(tensor, rows[name], 1 / SCALE) if name in rows else tensor).to(torch.float16)
            if not is_finite(half):
                whole = is_finite(tensor)
                raise ValueError(
                    f"{shown(info.path)} holds {'values beyond float16' if whole else 'NaN or infinite values'} in "
                    f"'{name}', expected finite numbers up to 65504: "
                    + ("choose bfloat16 or float32." if whole else "take a file that is whole, in bfloat16 or float32.")
                )
            return half

        return converted

    return for_module


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    # The extremes are NaN where a value is: two numbers to look at, and no mask as large as the tensor.
    return tensor.numel() == 0 or all(math.isfinite(value.item()) for value in torch.aminmax(tensor.detach()))


def finite_picture(picture: Tensor) -> Tensor:
    """What Stage A decoded; ValueError where it is not finite: clamped, NaN would be a black picture."""
    if not is_finite(picture):
        raise ValueError(
            "Stage A gave a picture with NaN or infinite values, expected finite ones: load Stage A in float32 if it "
            "runs in float16, or look at the latent that it was given."
        )
    return picture


def described(module: object) -> str:
    """What a loader says of a rescaled model; empty for others."""
    scale = scale_of(module)
    return "" if scale == 1 else f"last level divided by {scale:g} to stay in float16's range"


def refuse_rescaled(module: object, title: str, what: str) -> None:
    """ValueError for a rescaled model where its weights are read as if they were the published ones."""
    if scale_of(module) != 1:
        raise ValueError(
            f"{title} was loaded in float16 with its last level rescaled, and {what} needs the weights as they were "
            "published: load it in bfloat16 or float32 for that."
        )
