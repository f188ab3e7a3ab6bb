"""How much memory a stage needs beside its weights, for hosts that make room before it runs.

Counted in runs of the published sizes: the most bytes of tensors alive at once, with an attention that does not
build its matrix of scores. The factors are rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .denoisers import Pictures, TextCondition
from .free_memory import free_bytes, gigabytes
from .handles import StageHandle
from .models.layers import AttnBlock
from .quantized import working_bytes
from .reuse import kept_bytes
from .sizes import ENCODER_COMPRESSION, stage_b_size
from .tiles import decoding_reach, encoding_reach, largest_tile
from .windows import windows_of

if TYPE_CHECKING:
    from .stages import SamplingSettings
    from .wires import Latent

# Tensors of the network's width at the latent's resolution. Counted: up to 13.1 for Stage C, 9.3 for Stage B.
_SAMPLING_TENSORS = {"stage_c": 16, "stage_b": 11}
# Of Stage A's greatest width for each cell of its latent; it works in strips, but for small pictures. Counted: 17.2 to
# decode and 16.3 to encode a small one; of a large one up to 1.2 and 1.08 GB for the strips, and 3.8 and 0.8 GB.
_SMALL_TENSORS = 18
_DECODING_TENSORS, _DECODING_STRIPS = 1.3, 1_200_000_000
_ENCODING_TENSORS, _ENCODING_STRIPS = 4.2, 800_000_000
# A CPU's strips are smaller. Counted: 24 MB.
_CPU_STRIPS = 40_000_000
# Counted: 32.1 of the previewer's greatest width.
_PREVIEW_TENSORS = 36
# Pixels of the tiles that are chosen from where a whole picture does not fit, and bytes to leave free beside one.
_TILES = (2048, 1024, 512, 256)
_SPARED = 256 * 2**20
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
    activations = _SAMPLING_TENSORS[handle.stage] * rows * columns * model.c_hidden[0]
    key_values = sum(2 * block.kv_mapper[1].out_features * tokens for block in model.blocks_of(AttnBlock))
    total = batch * (activations + key_values) * handle.dtype.itemsize + working_bytes(model, handle.dtype)
    if (rows, columns) != whole:
        # What windows are cut from: the Stage C latent on all tokens and a few latents, in float32.
        total += batch * whole[0] * whole[1] * _WINDOWED_CHANNELS * 4
    return total


def stage_c_bytes(
    handle: StageHandle, latent: Latent, prompts: Sequence[TextCondition], pictures: Pictures | None = None
) -> int:
    """Bytes for a whole run of Stage C from a prompt and a negative prompt; the pictures belong to the first."""
    tokens = condition_tokens(handle, prompts, [pictures, pictures])
    return sampling_bytes(handle, latent.samples.shape, tokens) + attached_bytes(handle, latent.samples.shape)


def stage_b_bytes(handle: StageHandle, prior: Latent, settings: SamplingSettings) -> int:
    """Bytes for a whole run of Stage B on a Stage C latent."""
    size = stage_b_size(*prior.stage_c_pixels())
    windows = windows_of(handle.module, size, settings.window, settings.window_overlap)
    shape = (len(prior.samples), 4, *size)
    needed = sampling_bytes(handle, shape, handle.module.c_clip_seq, largest=windows.largest)
    return needed + kept_bytes(handle, len(prior.samples), windows)


def decoding_bytes(handle: StageHandle, shape: Sequence[int], tile: int = 0, on_cpu: bool = False) -> int:
    """Bytes to decode one latent of `shape` ``[B, C, h, w]`` with Stage A in tiles of `tile` pixels; 0 is none.

    on_cpu: where that is known; a GPU needs more.
    """
    reach = decoding_reach(handle.expect("stage_a").module)
    strips = _CPU_STRIPS if on_cpu else _DECODING_STRIPS
    return _tiled(handle, largest_tile((shape[2], shape[3]), tile, reach), _DECODING_TENSORS, strips)


def autoencoding_bytes(handle: StageHandle, shape: Sequence[int], tile: int = 0, on_cpu: bool = False) -> int:
    """Bytes to encode one picture to a latent of `shape` ``[B, C, h, w]`` with Stage A; see `decoding_bytes`."""
    reach = encoding_reach(handle.expect("stage_a").module)
    strips = _CPU_STRIPS if on_cpu else _ENCODING_STRIPS
    return _tiled(handle, largest_tile((shape[2], shape[3]), tile, reach), _ENCODING_TENSORS, strips)


def _tiled(handle: StageHandle, cells: tuple[int, int], tensors: float, strips: int) -> int:
    one = cells[0] * cells[1] * handle.module.up_blocks[0][0].out_channels * handle.dtype.itemsize
    return round(min(_SMALL_TENSORS * one, tensors * one + strips))


def fitting_tile(
    handle: StageHandle,
    shape: Sequence[int],
    tile: int = 0,
    needs: Callable[..., int] = decoding_bytes,
    free: int | None = None,
) -> tuple[int, list[str]]:
    """The tile to decode latents of `shape` ``[B, C, h, w]`` in, and what to say where it was not asked for.

    handle: where it computes. tile: pixels; 0 is the whole picture, which gives way to the largest tile that fits where
    the whole does not. needs: `decoding_bytes` or `autoencoding_bytes`. free: bytes; None is what is free there.
    """
    on_cpu = handle.device.type == "cpu"
    free = free_bytes(handle.device) if free is None else free
    whole = needs(handle, shape, 0, on_cpu)
    if tile or free is None or whole <= free - _SPARED:
        return tile, []
    fitting = (side for side in _TILES if needs(handle, shape, side, on_cpu) <= free - _SPARED)
    tile = next(fitting, _TILES[-1])
    return tile, [
        f"in tiles of {tile} pixels, since the whole picture would need {gigabytes(whole)} and {gigabytes(free)} are "
        "free; the result is the same up to rounding"
    ]


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
