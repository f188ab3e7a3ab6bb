"""Stage A: the autoencoder between pixels and the 4-channel latent, compression 4.

The release carries a VQGAN's codebook, but its chain never quantises: Stage A serves as a continuous autoencoder.
Architecture: Rampas et al., "A Novel Sampling Scheme for Text- and Image-Conditional Image Synthesis in Quantized
Latent Spaces" (2022, "Paella").
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import linear
from .in_place import activated, strips
from .layers import NORM_EPS, as_channels_last, as_image, layer_norm, pointwise

# Bytes of the widest level that are decoded at once on a CPU: a strip sees a little more than it gives.
_TAIL_STRIP = 24 << 20


class MixingBlock(nn.Module):
    """Depthwise convolution and MLP, each behind a norm with six learned gates shared by all channels.

    Input and output ``[B, H, W, C]``; `over` writes over its input.
    """

    def __init__(self, c: int, c_hidden: int):
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, 3, groups=c))
        self.channelwise = nn.Sequential(nn.Linear(c, c_hidden), nn.GELU(), nn.Linear(c_hidden, c))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gammas.to(x.device)  # a host that is short of memory leaves small weights where they were
        mixed = torch.addcmul(gate[1], layer_norm(x), 1 + gate[0])
        x = torch.addcmul(x, as_channels_last(self.depthwise(as_image(mixed))), gate[2])
        mixed = torch.addcmul(gate[4], layer_norm(x), 1 + gate[3])
        return torch.addcmul(x, self.channelwise(mixed), gate[5])

    def over(self, x: Tensor) -> Tensor:
        """The same, written over `x`, which is returned: strips of rows pass through the whole block."""
        first, _, last = self.channelwise
        gate = self.gammas.to(x.device)
        height, width = x.shape[1:3]
        for image in x.split(1):
            above = None
            for rows in strips(height, width, last.in_features * x.element_size(), x.device):
                strip = image[:, rows]
                # The convolution also reads the row below and the one above, which has been written over.
                normed = _gated_norm(image[:, rows.start : rows.stop + 1], gate[0], gate[1])
                seen = [normed[:, :1] if above is None else above, normed]
                if rows.stop == height:
                    seen.append(normed[:, -1:])
                above = normed[:, len(strip[0]) - 1 : len(strip[0])]
                padded = F.pad(as_image(torch.cat(seen, dim=1)), (1, 1, 0, 0), mode="replicate")
                torch.addcmul(strip, as_channels_last(self.depthwise[1](padded)), gate[2], out=strip)
                hidden = activated(linear(first, _gated_norm(strip, gate[3], gate[4])))
                torch.addcmul(strip, linear(last, hidden), gate[5], out=strip)
        return x


def _gated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm, times ``1 + scale``, plus `shift`, in one pass."""
    shape = x.shape[-1:]
    return F.layer_norm(x, shape, (1 + scale).expand(shape).contiguous(), shift.expand(shape).contiguous(), NORM_EPS)


class VectorQuantizer(nn.Module):
    """Nearest entry of a learned codebook."""

    def __init__(self, c_latent: int, size: int):
        super().__init__()
        self.codebook = nn.Embedding(size, c_latent)
        nn.init.uniform_(self.codebook.weight, -1 / size, 1 / size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise ``[B, H, W, c_latent]``; returns the entries, same shape, and their indices ``[B, H, W]``."""
        distances = torch.cdist(x.float().flatten(0, 2), self.codebook.weight.to(x.device, torch.float32))
        indices = distances.argmin(dim=-1).view(x.shape[:3])
        return self.codebook(indices), indices


class StageA(nn.Module):
    """Stage A; the defaults are the published model.

    Args:
        levels: halvings after the first pixel unshuffle, plus one; compression is ``2 ** levels``.
        bottleneck_blocks: mixing blocks at the lowest resolution of the decoder.
        c_hidden: width at the lowest resolution, halved at each level above.
        c_latent: channels of the latent.
        codebook_size: entries of the codebook.
        scale_factor: latents are divided by it on the way out and multiplied by it on the way in.
    """

    def __init__(
        self,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        c_hidden: int = 384,
        c_latent: int = 4,
        codebook_size: int = 8192,
        scale_factor: float = 0.43,
    ):
        super().__init__()
        self.c_latent, self.scale_factor = c_latent, scale_factor
        self.compression = 2**levels
        widths = [c_hidden // 2**i for i in reversed(range(levels))]
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(3 * 4, widths[0], 1))

        down: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i > 0:
                down.append(nn.Conv2d(widths[i - 1], width, 4, stride=2, padding=1))
            down.append(MixingBlock(width, width * 4))
        down.append(nn.Sequential(nn.Conv2d(widths[-1], c_latent, 1, bias=False), nn.BatchNorm2d(c_latent)))
        self.down_blocks = nn.ModuleList(down)

        self.vquantizer = VectorQuantizer(c_latent, codebook_size)

        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(c_latent, widths[-1], 1))]
        for i, width in enumerate(reversed(widths)):
            up.extend(MixingBlock(width, width * 4) for _ in range(bottleneck_blocks if i == 0 else 1))
            if i < levels - 1:
                up.append(nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1))
        self.up_blocks = nn.ModuleList(up)
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], 3 * 4, 1), nn.PixelShuffle(2))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.out_block[0].weight.dtype

    def encode(self, image: Tensor, quantize: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Encode a picture.

        Args:
            image: ``[B, 3, H, W]``, 0..1, height and width multiples of ``compression``.
            quantize: also look the latent up in the codebook.

        Returns:
            The latent ``[B, c_latent, H / 4, W / 4]``; its quantised form and the indices ``[B, H / 4, W / 4]``, or
            None and None.

        Raises:
            ValueError: the size is not a multiple of the compression.
        """
        height, width = image.shape[-2:]
        if height % self.compression or width % self.compression:
            raise ValueError(
                f"A picture of {width} x {height} was given; Stage A needs multiples of {self.compression}: resize it."
            )
        x = pointwise(as_channels_last(self.in_block[0](image.to(self.dtype))), self.in_block[1])
        x = self._through(self.down_blocks, x)
        latent = as_image(x) / self.scale_factor
        if not quantize:
            return latent, None, None
        entries, indices = self.vquantizer(x)
        return latent, as_image(entries) / self.scale_factor, indices

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents ``[B, c_latent, h, w]`` to ``[B, 3, 4 h, 4 w]``, about 0..1 and not clamped.

        The widest level, the last one, is made in strips of rows, so that no more than a strip of it is ever there.
        """
        x = pointwise(as_channels_last(latent.to(self.dtype) * self.scale_factor), self.up_blocks[0][0])
        last = max((i for i, block in enumerate(self.up_blocks) if isinstance(block, nn.ConvTranspose2d)), default=0)
        if last == 0 or self._keeps():
            return self._pixels(self._through(self.up_blocks[1:], x))
        x, tail = self._through(self.up_blocks[1:last], x), self.up_blocks[last:]
        # In rows of what goes in: half a one for the transposed convolution and for each block behind it.
        reach = math.ceil(len(tail) / 2)
        height, width = x.shape[1:3]
        scale = 4  # the transposed convolution doubles the sides, and so does the pixel shuffle
        picture = x.new_empty(len(x), 3, height * scale, width * scale)
        position = 4 * tail[0].out_channels * x.element_size()
        for rows in strips(height, width, position, x.device, least=8 * reach, most=_TAIL_STRIP):
            seen = slice(max(0, rows.start - reach), min(height, rows.stop + reach))
            pixels = self._pixels(self._through(tail, x[:, seen]))
            start = (rows.start - seen.start) * scale
            kept = slice(rows.start * scale, rows.stop * scale)
            picture[:, :, kept] = pixels[:, :, start : start + kept.stop - kept.start]
        return picture

    def _keeps(self) -> bool:
        """Whether what goes into a block is still needed: by autograd, or by a compiler that arranges it itself."""
        return torch.is_grad_enabled() or torch.compiler.is_compiling()

    def _through(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        keeps = self._keeps()
        for block in blocks:
            if isinstance(block, MixingBlock):
                x = block(x) if keeps else block.over(x)
            else:
                x = as_channels_last(block(as_image(x)))
        return x

    def _pixels(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(as_image(pointwise(x, self.out_block[0])), 2)
