"""How much memory a stage needs beside its weights, for hosts that make room before it runs.

Counted in runs of the published sizes: the most bytes of tensors alive at once, with an attention that does not
build its matrix of scores. The factors are rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence

from .denoisers import Pictures, TextCondition
from .handles import StageHandle
from .models.layers import AttnBlock
from .sizes import ENCODER_COMPRESSION
from .tiles import decoding_reach, largest_tile

# Tensors of the network's width at the latent's resolution. Counted: 12.7 for Stage C, 13.2 for Stage B.
_SAMPLING_TENSORS = 16
# Counted: 22.0 of Stage A's greatest width for each cell of its latent, 32.1 of the previewer's.
_DECODING_TENSORS = 26
_PREVIEW_TENSORS = 36
# Channels for each token of what windows are cut from and put into; counted: 48.
_WINDOWED_CHANNELS = 64
# Counted: 6.5 of an EfficientNet's first layer, 2.0 of the widest layer of the ControlNets that read maps.
_PICTURE_TENSORS = 7
_MAP_TENSORS = 2


def condition_tokens(handle: StageHandle, prompts: Sequence[TextCondition], pictures: Sequence[Pictures | None]) -> int:
    """The most tokens that Stage C's attention reads of one of these prompts with its pictures."""
    embeddings = (1 + (1 if picture is None else picture.embeddings.shape[1]) for picture in pictures)
    texts = (prompt.hidden.shape[1] for prompt in prompts)
    return max(text + count * handle.module.c_clip_seq for text, count in zip(texts, embeddings, strict=True))


def sampling_bytes(
    handle: StageHandle,
    shape: Sequence[int],
    tokens: int,
    guided: bool = True,
    largest: tuple[int, int] | None = None,
) -> int:
    """Bytes to sample latents of `shape` ``[B, C, h, w]`` with `tokens` condition tokens with Stage B or Stage C.

    largest: rows and columns of tokens of the largest window that Stage B predicts; None is the whole latent.
    """
    model = handle.module
    batch = shape[0] * (2 if guided else 1)
    whole = model.token_size(*shape[2:])
    rows, columns = largest or whole
    activations = _SAMPLING_TENSORS * rows * columns * model.c_hidden[0]
    key_values = sum(2 * block.kv_mapper[1].out_features * tokens for block in model.blocks_of(AttnBlock))
    total = batch * (activations + key_values) * handle.dtype.itemsize
    if (rows, columns) != whole:
        # What windows are cut from: the Stage C latent on all tokens and a few latents, in float32.
        total += batch * whole[0] * whole[1] * _WINDOWED_CHANNELS * 4
    return total


def decoding_bytes(handle: StageHandle, shape: Sequence[int], tile: int = 0) -> int:
    """Bytes to decode one latent of `shape` ``[B, C, h, w]`` with Stage A in tiles of `tile` pixels; 0 is none."""
    model = handle.expect("stage_a").module
    widest = model.up_blocks[0][0].out_channels
    size = (shape[2], shape[3])
    rows, columns = largest_tile(size, tile, decoding_reach(model))
    return _DECODING_TENSORS * rows * columns * widest * handle.dtype.itemsize


def preview_bytes(handle: StageHandle, shape: Sequence[int]) -> int:
    """Bytes to show latents of `shape` ``[B, C, h, w]`` with the previewer."""
    widest = handle.expect("previewer").module.blocks[0].out_channels
    return _PREVIEW_TENSORS * shape[0] * shape[2] * shape[3] * widest * handle.dtype.itemsize


def encoding_bytes(handle: StageHandle, size: Sequence[int]) -> int:
    """Bytes to encode one picture of `size` ``(height, width)`` with the latent encoder."""
    return _picture_bytes(handle.expect("latent_encoder"), *size)


def attached_bytes(handle: StageHandle, shape: Sequence[int], guided: bool = True) -> int:
    """Bytes that what a Stage C carries needs more to sample latents of `shape` ``[B, 16, h, w]``.

    The residuals and the pictures' keys and values of the whole run, and the largest ControlNet while it makes them.
    """
    batch, (rows, columns) = shape[0], shape[2:]
    kept, running = 0, 0
    for control in handle.controls:
        if not control.strength:
            continue
        network = control.network.module
        pixels = network.bottleneck_mode == "effnet"
        cells = rows * columns if pixels else control.control.shape[2] * control.control.shape[3]
        width = network.projections[0][2].out_channels
        residuals = len(network.proj_blocks) * cells * width
        # Its own, and the sum with others or at another strength, in float32.
        kept += len(control.control) * residuals * (handle.dtype.itemsize + 4)
        running = max(running, _control_bytes(control.network, rows, columns, cells) + residuals * 4)
    for applied in handle.ip_adapters:
        if applied.weight:
            adapter = applied.adapter.module
            tokens = applied.embeddings.shape[1] * adapter.tokens_per_image
            kept += batch * (2 if guided else 1) * tokens * 2 * sum(adapter.c_hidden_per_block) * handle.dtype.itemsize
    return kept + running


def _control_bytes(network: StageHandle, rows: int, columns: int, cells: int) -> int:
    module = network.module
    if module.bottleneck_mode == "effnet":
        return _picture_bytes(network, rows * ENCODER_COMPRESSION, columns * ENCODER_COMPRESSION)
    widest = max(layer.out_channels for layer in module.backbone.modules() if hasattr(layer, "out_channels"))
    return _MAP_TENSORS * cells * widest * network.dtype.itemsize


def _picture_bytes(handle: StageHandle, height: int, width: int) -> int:
    first = handle.module.backbone[0][0].out_channels
    return _PICTURE_TENSORS * (height // 2) * (width // 2) * first * handle.dtype.itemsize
