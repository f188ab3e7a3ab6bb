"""Stage B: from Stage C's latent to Stage A's 4-channel latent, 256 x 256 for a picture of 1024 x 1024."""

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import as_channels_last, layer_norm, pointwise, resize
from .unet import CascadeUNet, Prepared


def pointwise_mapper(c_in: int, c_out: int) -> nn.Sequential:
    """1x1 convolution to four times the width, GELU, 1x1 convolution; a layer norm follows where it is used."""
    return nn.Sequential(nn.Conv2d(c_in, c_out * 4, 1), nn.GELU(), nn.Conv2d(c_out * 4, c_out, 1))


class StageB(CascadeUNet):
    """Stage B; the defaults are the published 1.5B model.

    Args beyond the base's:
        c_clip: width of the pooled text embedding; Stage B reads no other text.
        c_clip_seq: condition tokens made from it.
        c_effnet: channels of the Stage C latent.
        c_pixels: channels of the small picture that can be given as a condition.
    """

    def __init__(
        self,
        c_in: int = 4,
        c_out: int = 4,
        c_r: int = 64,
        patch_size: int = 2,
        c_cond: int = 1280,
        c_hidden: Sequence[int] = (320, 640, 1280, 1280),
        nhead: Sequence[int] = (-1, -1, 20, 20),
        blocks: Sequence[Sequence[int]] = ((2, 6, 28, 6), (6, 28, 6, 2)),
        block_repeat: Sequence[Sequence[int]] | None = ((1, 1, 1, 1), (3, 3, 2, 2)),
        level_config: Sequence[str] = ("CT", "CT", "CTA", "CTA"),
        c_clip: int = 1280,
        c_clip_seq: int = 4,
        c_effnet: int = 16,
        c_pixels: int = 3,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = (0.0, 0.0, 0.1, 0.1),
        self_attn: bool | Sequence[bool] = True,
        t_conds: Sequence[str] = ("sca",),
    ):
        super().__init__(
            c_in=c_in,
            c_out=c_out,
            c_r=c_r,
            patch_size=patch_size,
            c_cond=c_cond,
            c_hidden=c_hidden,
            nhead=nhead,
            blocks=blocks,
            block_repeat=block_repeat,
            level_config=level_config,
            kernel_size=kernel_size,
            dropout=dropout,
            self_attn=self_attn,
            t_conds=t_conds,
            downscaler=lambda level: nn.Conv2d(c_hidden[level - 1], c_hidden[level], 2, stride=2),
            upscaler=lambda level: nn.ConvTranspose2d(c_hidden[level], c_hidden[level - 1], 2, stride=2),
        )
        self.c_clip_seq, self.c_pixels = c_clip_seq, c_pixels
        self.effnet_mapper = pointwise_mapper(c_effnet, c_hidden[0])
        self.pixels_mapper = pointwise_mapper(c_pixels, c_hidden[0])
        self.clip_mapper = nn.Linear(c_clip, c_cond * c_clip_seq)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.clip_mapper.weight, std=0.02)
        for mapper in (self.effnet_mapper, self.pixels_mapper):
            for conv in (mapper[0], mapper[2]):
                nn.init.normal_(conv.weight, std=0.02)

    def on_tokens(self, effnet: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize Stage C latents ``[N, c_effnet, h, w]`` to `size`, rows and columns of tokens; float32."""
        return F.interpolate(effnet.float(), size=size, mode="bilinear", align_corners=True)

    def token_condition(self, latent: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Map Stage C's latent and the optional small picture to what the tokens of a picture, or of a part of it, get.

        Args:
            latent: ``[N, c_effnet, rows, columns]``, from `on_tokens` or a part of it.
            pixels: small picture of the same part ``[N, c_pixels, p, q]``; None is a black one, as in the release.

        Returns:
            ``[N, rows, columns, c_hidden[0]]``, to be added to the embedded latent.
        """

        def mapped(x: Tensor, mapper: nn.Sequential) -> Tensor:
            return layer_norm(pointwise(F.gelu(pointwise(x, mapper[0])), mapper[2]))

        # One black pixel maps to what any number of them does.
        pixels = latent.new_zeros(1, self.c_pixels, 1, 1) if pixels is None else pixels
        picture = mapped(as_channels_last(pixels.to(self.dtype)), self.pixels_mapper)
        if picture.shape[1:3] != (1, 1):
            picture = resize(picture.float(), latent.shape[2:]).to(self.dtype)
        return mapped(as_channels_last(latent.to(self.dtype)), self.effnet_mapper) + picture

    def prepare_text(self, timesteps: Tensor, clip: Tensor, sca: Tensor | None = None) -> Prepared:
        """`prepare` without the picture conditions, which are added to the embedded latent."""
        tokens = self.clip_mapper(clip.to(self.dtype)).reshape(len(clip), -1, self.c_cond)
        return self.prepare_blocks(timesteps, layer_norm(tokens), {"sca": sca})

    def prepare(
        self,
        timesteps: Tensor,
        effnet: Tensor,
        clip: Tensor,
        size: tuple[int, int],
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
    ) -> Prepared:
        """Compute once what all steps of a run share.

        Args:
            timesteps: noise conditions of the run's steps, 0..1, ``[S]`` (or ``[S, N]``, one per condition).
            effnet: Stage C latent ``[N, 16, h, w]``; zeros for the unconditional half.
            clip: projected pooled text, ``[N, P, c_clip]`` or ``[N, c_clip]``.
            size: height and width of the latents that will be sampled, multiples of the patch.
            pixels: optional small picture ``[N, 3, p, q]``.
            sca: size condition ``[N]`` or scalar; None counts as 0.
        """
        grid = self.on_tokens(effnet, self.token_size(*size))
        return replace(self.prepare_text(timesteps, clip, sca), added=self.token_condition(grid, pixels))

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        effnet: Tensor,
        clip: Tensor,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise of latents ``x [B, 4, H, W]`` at noise conditions ``r [B]`` (0 clean to 1 noise)."""
        return self.step(x, self.prepare(r[None], effnet, clip, x.shape[-2:], pixels, sca), 0)
