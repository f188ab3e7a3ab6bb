"""How much memory a stage needs beside its weights, for hosts that make room before it runs.

Counted in runs of the published sizes: the most bytes of tensors alive at once, with an attention that does not
build its matrix of scores. The factors are rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .denoisers import TextCondition
from .handles import StageHandle
from .models.layers import AttnBlock

# Tensors of the network's width at the latent's resolution. Counted: 12.7 for Stage C, 13.2 for Stage B.
_SAMPLING_TENSORS = 16
# Counted: 22.0 of Stage A's greatest width for each cell of its latent, 32.1 of the previewer's.
_DECODING_TENSORS = 26
_PREVIEW_TENSORS = 36


def condition_tokens(handle: StageHandle, prompts: Sequence[TextCondition], pictures: Sequence[Tensor | None]) -> int:
    """The most tokens that Stage C's attention reads of one of these prompts with its pictures."""
    embeddings = (1 + (1 if picture is None else picture.shape[1]) for picture in pictures)
    texts = (prompt.hidden.shape[1] for prompt in prompts)
    return max(text + count * handle.module.c_clip_seq for text, count in zip(texts, embeddings, strict=True))


def sampling_bytes(handle: StageHandle, shape: Sequence[int], tokens: int, guided: bool = True) -> int:
    """Bytes to sample latents of `shape` ``[B, C, h, w]`` with `tokens` condition tokens with Stage B or Stage C."""
    model = handle.module
    batch = shape[0] * (2 if guided else 1)
    rows, columns = model.token_size(*shape[2:])
    activations = _SAMPLING_TENSORS * rows * columns * model.c_hidden[0]
    key_values = sum(2 * block.kv_mapper[1].out_features * tokens for block in model.blocks_of(AttnBlock))
    return batch * (activations + key_values) * handle.dtype.itemsize


def decoding_bytes(handle: StageHandle, shape: Sequence[int]) -> int:
    """Bytes to decode one latent of `shape` ``[B, C, h, w]`` with Stage A."""
    widest = handle.expect("stage_a").module.up_blocks[0][0].out_channels
    return _DECODING_TENSORS * shape[2] * shape[3] * widest * handle.dtype.itemsize


def preview_bytes(handle: StageHandle, shape: Sequence[int]) -> int:
    """Bytes to show latents of `shape` ``[B, C, h, w]`` with the previewer."""
    widest = handle.expect("previewer").module.blocks[0].out_channels
    return _PREVIEW_TENSORS * shape[0] * shape[2] * shape[3] * widest * handle.dtype.itemsize
