"""The blocks that Stage B and Stage C are made of.

Activations are channels-last throughout: ``[B, H, W, C]`` contiguous. Layer norms, linears and attention read that
layout as it is, and a convolution sees it as a channels-last image through a view, so no block copies to transpose.

Architecture: Pernias et al., "Würstchen: An Efficient Architecture for Large-Scale Text-to-Image Diffusion Models"
(2023), in the form released as Stable Cascade.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import at_hand, dense, linear
from .in_place import Workspace, add_mlp
from .response_norm import response_norm

NORM_EPS = 1e-6

# Keys and values [B or 1, T, 2 c] that attention reads apart from the others, and how much of the result is added:
# a number, or one for each image and token [B or 1, L or 1, 1].
WeightedKeyValue = tuple[Tensor, float | Tensor]


def layer_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """Normalise the last axis without learned scale or shift; the same for `x` divided by `scale` as for `x`."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS / scale**2)


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a 1x1 convolution to a channels-last tensor ``[B, H, W, C_in]``."""
    weights = at_hand(conv)
    # A layer of a host fetches its weights only when it is called.
    return as_channels_last(conv(as_image(x))) if weights is None else dense(x, weights[0].flatten(1), weights[1])


def as_image(x: Tensor) -> Tensor:
    """View ``[B, H, W, C]`` as ``[B, C, H, W]`` in channels-last memory."""
    return x.permute(0, 3, 1, 2)


def as_channels_last(x: Tensor) -> Tensor:
    """View ``[B, C, H, W]`` as contiguous ``[B, H, W, C]``; copies only where the memory is not channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[B, H, W, C]`` to ``size`` = (height, width), bilinear with aligned corners as in the release."""
    return as_channels_last(F.interpolate(as_image(x), size=size, mode="bilinear", align_corners=True))


def timestep_embedding(r: Tensor, width: int, max_positions: int = 10_000) -> Tensor:
    """Sinusoidal embedding of a noise level.

    Args:
        r: noise condition, 0 (clean) to 1 (noise), any shape, used in float32 whatever the weights are.
        width: length of the embedding.

    Returns:
        ``[*r.shape, width]`` float32: sines, then cosines, then a zero if ``width`` is odd.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=r.device).float() * (-math.log(max_positions) / (half - 1)))
    angles = r.float()[..., None] * max_positions * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(embedding, (0, width % 2))


class GlobalResponseNorm(nn.Module):
    """`response_norm` with learned weights; input and output ``[B, H, W, C]``."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        # A host that is short of memory leaves small weights where they were.
        return response_norm(x, self.gamma.to(x.device), self.beta.to(x.device))

    @property
    def is_plain(self) -> bool:
        """Whether `scale` and `beta` say what it does; a host's may keep its weights elsewhere."""
        return type(self) is GlobalResponseNorm

    def scale(self, response: Tensor) -> Tensor:
        """What each channel is multiplied by where its norms over a picture are `response` ``[..., C]``; float32."""
        # `response_share` with sums in place of means, in as few operations as there are: small models feel each one.
        channels = response.shape[-1]
        total = response.sum(dim=-1, keepdim=True).add_(1e-6 * channels)
        return torch.addcdiv(response.new_ones(1), self.gamma.to(response) * response, total, value=channels)


def channelwise_mlp(c_in: int, c: int, dropout: float) -> nn.Sequential:
    """The per-pixel MLP with global response norm; ``c_in`` to ``4 c`` to ``c`` channels."""
    return nn.Sequential(
        nn.Linear(c_in, c * 4), nn.GELU(), GlobalResponseNorm(c * 4), nn.Dropout(dropout), nn.Linear(c * 4, c)
    )


class ResBlock(nn.Module):
    """Depthwise convolution, layer norm, MLP, residual; a skip tensor joins before the MLP.

    With a `Workspace` the result is written over the input.
    """

    stream_scale = 1.0  # what the stream that it adds to is divided by, see `float16`

    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.channelwise = channelwise_mlp(c + c_skip, c, dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        if workspace is not None:
            return add_mlp(x, partial(self.mixed, x, skip), self.channelwise, workspace)
        return x + self.channelwise(self.mixed(x, skip))

    def mixed(
        self, x: Tensor, skip: Tensor | None = None, image: slice | None = None, rows: slice | None = None
    ) -> Tensor:
        """What the MLP reads of some rows of some images of `x` ``[B, H, W, c]``; without `rows` of all."""
        if rows is None:
            mixed = as_channels_last(self.depthwise(as_image(x)))
        else:
            reach = self.depthwise.kernel_size[0] // 2
            seen = slice(max(0, rows.start - reach), min(x.shape[1], rows.stop + reach))
            mixed = as_channels_last(self.depthwise(as_image(x[image, seen])))
            mixed = mixed[:, rows.start - seen.start : rows.stop - seen.start]
            skip = None if skip is None else skip[image, rows]
        hidden = layer_norm(mixed, self.stream_scale)
        return hidden if skip is None else torch.cat([hidden, skip], dim=-1)


class FeedForwardBlock(nn.Module):
    """Layer norm, MLP, residual. With a `Workspace` the result is written over the input."""

    stream_scale = 1.0  # what the stream that it adds to is divided by, see `float16`

    def __init__(self, c: int, dropout: float = 0.0):
        super().__init__()
        self.channelwise = channelwise_mlp(c, c, dropout)

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        if workspace is not None:
            return add_mlp(x, partial(self.mixed, x), self.channelwise, workspace)
        return x + self.channelwise(self.mixed(x))

    def mixed(self, x: Tensor, image: slice | None = None, rows: slice | None = None) -> Tensor:
        """What the MLP reads of some rows of some images of `x` ``[B, H, W, c]``; without `rows` of all."""
        return layer_norm(x if rows is None else x[image, rows], self.stream_scale)


class TimestepBlock(nn.Module):
    """Scale and shift the channels by the noise level and the size conditions (``sca``, ``crp``)."""

    def __init__(self, c: int, c_timestep: int, conds: list[str]):
        super().__init__()
        self.conds = list(conds)
        self.mapper = nn.Linear(c_timestep, c * 2)
        for cond in self.conds:
            setattr(self, f"mapper_{cond}", nn.Linear(c_timestep, c * 2))

    def prepare(self, embeddings: list[Tensor]) -> Tensor:
        """Map the embeddings ``[S, N or 1, c_timestep]`` of noise level and conditions to ``[S, N or 1, 1, 1, 2 c]``.

        They are in the dtype of the weights.
        The first half of the last axis is the scale with its 1 already added, the second half the shift.
        """
        mappers = [self.mapper, *(getattr(self, f"mapper_{cond}") for cond in self.conds)]
        modulation = sum(mapper(embedding) for mapper, embedding in zip(mappers, embeddings, strict=True))
        scale, shift = modulation.chunk(2, dim=-1)
        return torch.cat([1 + scale, shift], dim=-1)[:, :, None, None, :]

    def forward(self, x: Tensor, modulation: Tensor, workspace: Workspace | None = None) -> Tensor:
        """Apply one step's modulation ``[N or 1, 1, 1, 2 c]`` to ``[B, H, W, c]``; over it if there is a workspace."""
        scale, shift = modulation.chunk(2, dim=-1)
        return torch.addcmul(shift, x, scale, out=None if workspace is None else x)


class Attention(nn.Module):
    """Multi-head attention over packed projections, with the keys and values of the conditions given ready-made."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0):
        super().__init__()
        if nhead < 1 or c % nhead:
            raise ValueError(f"{nhead} attention heads do not divide {c} channels; give a divisor of the width.")
        self.nhead = nhead
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c, c))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c))
        self.out_proj = nn.Linear(c, c)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def project(self, tokens: Tensor, parts: slice) -> Tensor:
        """Project ``[N, T, c]`` with some thirds (0 query, 1 key, 2 value) of the packed weights."""
        if parts.start == 0 and parts.stop == 3:
            return dense(tokens, self.in_proj_weight, self.in_proj_bias)
        c = tokens.shape[-1]
        rows = slice(parts.start * c, parts.stop * c)
        return dense(tokens, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def forward(
        self, tokens: Tensor, key_value: Tensor, self_attn: bool, decoupled: Sequence[WeightedKeyValue] = ()
    ) -> Tensor:
        """Attend from ``[B, L, c]`` to the prepared ``[B or 1, T, 2 c]`` and, if ``self_attn``, to the tokens too.

        Each of `decoupled` is attended to by itself with the same queries, and added with its weight.
        """
        c = tokens.shape[-1]
        if self_attn:
            query, own = self.project(tokens, slice(0, 3)).split([c, 2 * c], dim=-1)
            key_value = torch.cat([own, key_value.expand(tokens.shape[0], -1, -1)], dim=1)
        else:
            query = self.project(tokens, slice(0, 1))
        attended = self.attend(query, key_value)
        for other, weight in decoupled:
            attended = attended + (weight * self.attend(query, other.to(query))).to(attended.dtype)
        return linear(self.out_proj, attended)

    def attend(self, query: Tensor, key_value: Tensor) -> Tensor:
        """What queries ``[B, L, c]`` read from ``[B or 1, T, 2 c]``: ``[B, L, c]``, not yet through `out_proj`."""
        batch, length, c = query.shape
        query = query.view(batch, length, self.nhead, -1).transpose(1, 2)
        key_value = key_value.expand(batch, -1, -1)
        key, value = key_value.view(batch, -1, 2, self.nhead, c // self.nhead).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return attended.transpose(1, 2).reshape(batch, length, c)


class AttnBlock(nn.Module):
    """Layer norm, attention to the picture's own tokens and the conditions, residual.

    With a `Workspace` the result is written over the input.
    """

    stream_scale = 1.0  # what the stream that it adds to is divided by, see `float16`

    def __init__(self, c: int, c_cond: int, nhead: int, self_attn: bool = True, dropout: float = 0.0):
        super().__init__()
        self.self_attn = self_attn
        # Published tensor names have the extra `attn` level.
        self.attention = nn.ModuleDict({"attn": Attention(c, nhead, dropout)})
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def prepare(self, condition: Tensor) -> Tensor:
        """Keys and values ``[N, T, 2 c]`` of the condition tokens ``[N, T, c_cond]``."""
        return self.attention["attn"].project(self.kv_mapper(condition), slice(1, 3))

    def forward(
        self,
        x: Tensor,
        key_value: Tensor,
        decoupled: Sequence[WeightedKeyValue] = (),
        workspace: Workspace | None = None,
    ) -> Tensor:
        tokens = layer_norm(x, self.stream_scale).flatten(1, 2)
        attended = self.attention["attn"](tokens, key_value, self.self_attn, decoupled).view_as(x)
        return x + attended if workspace is None else x.add_(attended)
