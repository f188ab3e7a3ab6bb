"""IP-Adapter for Stage C: pictures with keys and values of their own beside the text's.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (2023). A CLIP
embedding of a picture becomes a few tokens; in every attention block the adapter maps them to keys and values, the
block's own queries attend to them by themselves, and the result is added to the block's attention with a weight before
the block's output projection ("decoupled attention").

How to use one::

    adapter.check(model)                                          # refuses a Stage C that it was not made for
    pictures = embeddings                                         # [N, n, E], one row per condition of `prepare`
    attention = adapter.attention(pictures, weight=0.8)           # one weight, or one per attention block; a mask
    prepared = model.prepare(levels, text, pooled, image, decoupled=[attention])
    prediction = model.step(x, prepared, index)

* Several pictures per condition are the ``n`` of ``[N, n, E]``: their tokens are concatenated. To average them, average
  the embeddings. Several adapters, or one adapter twice with other masks, are several entries of ``decoupled``.
* The unconditional half of a guided run gets the adapter of a zero embedding: that is what the adapter was trained to
  read as "no picture". So both halves together are
  ``adapter.attention(torch.cat([pictures, torch.zeros_like(pictures)]), ...)``, with a mask of ``[1, H, W]``, or one of
  ``[n, H, W]`` repeated for both halves.
* Start and end: for steps in which it does not act, run `step` with ``dataclasses.replace(prepared, decoupled=())``.
* Blocks are counted as ``model.blocks_of(AttnBlock)`` gives them, way down first. A repeated block has one entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import AttnBlock, WeightedKeyValue

if TYPE_CHECKING:
    from .unet import CascadeUNet


@dataclass(frozen=True)
class DecoupledAttention:
    """What the attention blocks read apart from the text, for ``N`` conditions (or one for all).

    Attributes:
        key_values: per attention block ``[N, T, 2 c]``, or None where the block reads nothing.
        weights: per attention block, how much is added; 1 is what the adapter was trained with.
        mask: ``[N or 1, H, W]``, 0..1, multiplies the weight over the picture; any size, averaged down or repeated up
            to a block's tokens. ``[N, 1, 1]`` is a weight per condition. None is 1 everywhere.
    """

    key_values: tuple[Tensor | None, ...]
    weights: tuple[float, ...]
    mask: Tensor | None = None

    def narrow(self, start: int, length: int) -> "DecoupledAttention":
        """The part for ``length`` conditions from ``start`` on, as views; what serves all conditions stays."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or len(tensor) == 1 else tensor.narrow(0, start, length)

        return DecoupledAttention(tuple(map(part, self.key_values)), self.weights, part(self.mask))

    def check(self, key_values: Sequence[Tensor]) -> None:
        """ValueError where it does not fit the network or the conditions whose own keys and values these are."""
        if len(self.key_values) != len(key_values):
            raise ValueError(
                f"The IP-Adapter has keys and values for {len(self.key_values)} attention blocks and the network has "
                f"{len(key_values)}: use the Stage C that the adapter was trained on."
            )
        conditions = len(key_values[0]) if key_values else 1
        if self.mask is not None and (self.mask.ndim != 3 or len(self.mask) not in (1, conditions)):
            raise ValueError(
                f"The mask of the IP-Adapter has the shape {tuple(self.mask.shape)}, expected [1 or {conditions}, "
                "height, width]: give one mask for all conditions or one for each."
            )
        for block, (ours, its) in enumerate(zip(self.key_values, key_values, strict=True)):
            if ours is not None and (ours.shape[2] != its.shape[2] or len(ours) not in (1, len(its))):
                raise ValueError(
                    f"The IP-Adapter has keys and values of the shape {tuple(ours.shape)} for attention block {block}, "
                    f"expected {len(its)} conditions (or one) and a width of {its.shape[2]}: use the Stage C that the "
                    "adapter was trained on, and one picture embedding for all conditions or one for each."
                )

    def at(self, block: int, size: Sequence[int]) -> WeightedKeyValue | None:
        """Keys, values and weight for an attention block with ``size`` = (rows, columns) of tokens, if it reads any."""
        key_value = self.key_values[block]
        if key_value is None:
            return None
        if self.mask is None:
            return key_value, self.weights[block]
        mask = self.mask[:, None].to(key_value.device).float()
        if mask.shape[-2:] != tuple(size):
            mask = F.interpolate(mask, size=tuple(size), mode="area")
        return key_value, self.weights[block] * mask.flatten(2).transpose(1, 2)


class ImageProjection(nn.Module):
    """One embedding to a few normalised tokens."""

    def __init__(self, c_image: int, c_cond: int, tokens: int):
        super().__init__()
        self.proj = nn.Linear(c_image, c_cond * tokens)
        self.norm = nn.LayerNorm(c_cond)

    def forward(self, embeddings: Tensor) -> Tensor:
        """``[B, n, c_image]`` to ``[B, n tokens, c_cond]``."""
        return self.norm(self.proj(embeddings).reshape(len(embeddings), -1, self.norm.normalized_shape[0]))


class IPAdapter(nn.Module):
    """Image tokens, and keys and values of them for every attention block of a Stage C. A new one changes nothing.

    Tensor names: ``image_proj.proj``, ``image_proj.norm``, ``ip_adapter.{N}.to_k_ip.weight``, ``to_v_ip.weight``.

    Args:
        c_image: width of the picture embeddings (768 for CLIP ViT-L/14).
        c_cond: width of the tokens.
        c_hidden_per_block: width of each attention block.
        tokens: how many tokens each embedding becomes.
    """

    def __init__(self, c_image: int, c_cond: int, c_hidden_per_block: Sequence[int], tokens: int = 4):
        super().__init__()
        if tokens < 1 or not c_hidden_per_block:
            raise ValueError(
                f"An IP-Adapter of {tokens} tokens for {len(c_hidden_per_block)} attention blocks was asked for, "
                "expected at least one of each: give tokens and one width per attention block of the Stage C."
            )
        self.c_image, self.tokens_per_image, self.c_hidden_per_block = c_image, tokens, tuple(c_hidden_per_block)
        self.image_proj = ImageProjection(c_image, c_cond, tokens)
        self.ip_adapter = nn.ModuleList(
            nn.ModuleDict({"to_k_ip": nn.Linear(c_cond, c, bias=False), "to_v_ip": nn.Linear(c_cond, c, bias=False)})
            for c in self.c_hidden_per_block
        )
        for block in self.ip_adapter:
            nn.init.zeros_(block["to_v_ip"].weight)

    # Where the layers cast their weights themselves, what they cast them to.
    compute_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in: that of the weights, unless `compute_dtype` says another."""
        return self.compute_dtype or self.image_proj.proj.weight.dtype

    @staticmethod
    def config_for(model: "CascadeUNet", c_image: int, tokens: int = 4) -> dict:
        """Constructor arguments of an adapter for this Stage C."""
        mappers = [block.kv_mapper[1] for block in model.blocks_of(AttnBlock)]
        return {
            "c_image": c_image,
            "c_cond": model.c_cond,
            "c_hidden_per_block": [mapper.out_features for mapper in mappers],
            "tokens": tokens,
        }

    def check(self, model: "CascadeUNet") -> None:
        """ValueError where the adapter was made for a Stage C of another size."""
        widths = self.config_for(model, self.c_image)["c_hidden_per_block"]
        if list(self.c_hidden_per_block) != widths:
            raise ValueError(
                f"The IP-Adapter has keys and values for {_blocks(self.c_hidden_per_block)} and this Stage C has "
                f"{_blocks(widths)}: use the Stage C that the adapter was trained on, or train one for this."
            )

    def tokens(self, embeddings: Tensor) -> Tensor:
        """Tokens ``[B, n tokens, c_cond]`` of picture embeddings ``[B, n, c_image]`` or ``[B, c_image]``."""
        if embeddings.shape[-1] != self.c_image or embeddings.ndim not in (2, 3):
            raise ValueError(
                f"The image embedding has the shape {tuple(embeddings.shape)}, expected [batch, pictures, "
                f"{self.c_image}]: encode the picture with the image encoder that the IP-Adapter was trained with."
            )
        embeddings = embeddings[:, None] if embeddings.ndim == 2 else embeddings
        return self.image_proj(embeddings.to(self.dtype))

    def key_values(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Keys and values ``[B, T, 2 c]`` of the tokens ``[B, T, c_cond]``, one per attention block."""
        return tuple(
            torch.cat([block["to_k_ip"](tokens), block["to_v_ip"](tokens)], dim=-1) for block in self.ip_adapter
        )

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Keys and values ``[B, n tokens, 2 c]`` of picture embeddings ``[B, n, c_image]``, one per attention block."""
        return self.key_values(self.tokens(embeddings))

    def attention(
        self, embeddings: Tensor, weight: float | Sequence[float] = 1.0, mask: Tensor | None = None
    ) -> DecoupledAttention:
        """What `StageC.prepare` takes in its list ``decoupled``.

        Args:
            embeddings: CLIP image embeddings, ``[N, n, c_image]`` or ``[N, c_image]``; zeros are "no picture".
            weight: for all attention blocks, or one for each; a block with 0 is left as it is, to the last bit.
            mask: where it acts, ``[N or 1, H, W]``, 0..1; see `DecoupledAttention`.
        """
        blocks = len(self.ip_adapter)
        weights = (float(weight),) * blocks if isinstance(weight, int | float) else tuple(map(float, weight))
        if len(weights) != blocks:
            raise ValueError(
                f"{len(weights)} weights were given for an IP-Adapter of {blocks} attention blocks: give one number "
                "for all of them or one per block."
            )
        read = self(embeddings)
        return DecoupledAttention(
            tuple(key_value if weight else None for key_value, weight in zip(read, weights, strict=True)), weights, mask
        )


def _blocks(widths: Sequence[int]) -> str:
    counts = {width: list(widths).count(width) for width in dict.fromkeys(widths)}
    return (
        " and ".join(f"{count} attention block{'s' * (count > 1)} of width {width}" for width, count in counts.items())
        or "none"
    )
