"""Stage C: from text (and picture) embeddings to the 16-channel latent, 24 x 24 for a picture of 1024 x 1024."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ip_adapter import DecoupledAttention
from .layers import layer_norm
from .unet import CascadeUNet, ControlResiduals, Prepared


class Resample(nn.Module):
    """1x1 convolution between two levels, with a bilinear change of size where ``factor`` is not 1.

    The resampling comes after the convolution on the way down and before it on the way up; the published tensor names
    count both.
    """

    def __init__(self, c_in: int, c_out: int, factor: float, conv_first: bool):
        super().__init__()
        conv = nn.Conv2d(c_in, c_out, 1)
        scale = nn.Identity()
        if factor != 1:
            scale = nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=True)
        self.blocks = nn.Sequential(conv, scale) if conv_first else nn.Sequential(scale, conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class StageC(CascadeUNet):
    """Stage C; the defaults are the published 3.6B model (lite: c_cond 1536, c_hidden 1536, nhead 24, half the blocks).

    Args beyond the base's:
        c_clip_text, c_clip_text_pooled, c_clip_img: widths of the CLIP embeddings.
        c_clip_seq: condition tokens made from each pooled or picture embedding.
        switch_level: for each step between levels, whether the resolution halves.
    """

    def __init__(
        self,
        c_in: int = 16,
        c_out: int = 16,
        c_r: int = 64,
        patch_size: int = 1,
        c_cond: int = 2048,
        c_hidden: Sequence[int] = (2048, 2048),
        nhead: Sequence[int] = (32, 32),
        blocks: Sequence[Sequence[int]] = ((8, 24), (24, 8)),
        block_repeat: Sequence[Sequence[int]] | None = ((1, 1), (1, 1)),
        level_config: Sequence[str] = ("CTA", "CTA"),
        c_clip_text: int = 1280,
        c_clip_text_pooled: int = 1280,
        c_clip_img: int = 768,
        c_clip_seq: int = 4,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = (0.1, 0.1),
        self_attn: bool | Sequence[bool] = True,
        t_conds: Sequence[str] = ("sca", "crp"),
        switch_level: Sequence[bool] = (False,),
    ):
        if len(switch_level) != len(c_hidden) - 1:
            raise ValueError(
                f"switch_level has {len(switch_level)} entries; {len(c_hidden)} levels need {len(c_hidden) - 1}."
            )
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
            downscaler=lambda level: Resample(
                c_hidden[level - 1], c_hidden[level], 0.5 if switch_level[level - 1] else 1, conv_first=True
            ),
            upscaler=lambda level: Resample(
                c_hidden[level], c_hidden[level - 1], 2 if switch_level[level - 1] else 1, conv_first=False
            ),
        )
        self.c_clip_seq = c_clip_seq
        self.clip_txt_mapper = nn.Linear(c_clip_text, c_cond)
        self.clip_txt_pooled_mapper = nn.Linear(c_clip_text_pooled, c_cond * c_clip_seq)
        self.clip_img_mapper = nn.Linear(c_clip_img, c_cond * c_clip_seq)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        for mapper in (self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper):
            nn.init.normal_(mapper.weight, std=0.02)

    def condition_tokens(
        self,
        clip_text: Tensor,
        clip_text_pooled: Tensor | None = None,
        clip_img: Tensor | None = None,
        clip_img_weight: Tensor | None = None,
    ) -> Tensor:
        """Map the CLIP embeddings to the sequence that attention reads.

        Args:
            clip_text: last hidden state before the final norm, ``[N, T, c_clip_text]``.
            clip_text_pooled: projected pooled text, ``[N, P, c_clip_text_pooled]`` or ``[N, c_clip_text_pooled]``.
            clip_img: picture embeddings, ``[N, I, c_clip_img]`` or ``[N, c_clip_img]``.
            clip_img_weight: how far the tokens of each picture go from those of an embedding of zeros, which is no
                picture, (0) to its own (1), ``[N, I]`` or ``[1, I]``; other values lie on the same straight line.
                None is 1. The embedding itself is no dial: the norm takes back what scales it.

        Returns:
            ``[N, T + c_clip_seq (P + I), c_cond]``, normalised except where a weight is not 1.
        """

        def spread(embedding: Tensor, mapper: nn.Linear) -> Tensor:
            return mapper(embedding.to(self.dtype)).reshape(len(embedding), -1, self.c_cond)

        tokens = [self.clip_txt_mapper(clip_text.to(self.dtype))]
        if clip_text_pooled is not None:
            tokens.append(spread(clip_text_pooled, self.clip_txt_pooled_mapper))
        if clip_img is not None:
            tokens.append(spread(clip_img, self.clip_img_mapper))
        condition = layer_norm(torch.cat(tokens, dim=1))
        if clip_img is None or clip_img_weight is None:
            return condition
        words, pictures = condition.split([condition.shape[1] - tokens[-1].shape[1], tokens[-1].shape[1]], dim=1)
        nothing = layer_norm(spread(clip_img.new_zeros(1, clip_img.shape[-1]), self.clip_img_mapper))
        nothing = nothing.repeat(1, pictures.shape[1] // self.c_clip_seq, 1).float()
        weight = clip_img_weight.float().repeat_interleave(self.c_clip_seq, dim=1)[..., None]
        weighted = (nothing + weight * (pictures.float() - nothing)).to(pictures.dtype)
        return torch.cat([words, torch.where(weight == 1, pictures, weighted)], dim=1)

    def prepare(
        self,
        timesteps: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor | None = None,
        clip_img: Tensor | None = None,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        decoupled: Sequence[DecoupledAttention] = (),
        clip_img_weight: Tensor | None = None,
    ) -> Prepared:
        """Compute once what all steps of a run share.

        Args:
            timesteps: noise conditions of the run's steps, 0..1, ``[S]`` (or ``[S, N]``, one per condition).
            clip_text, clip_text_pooled, clip_img, clip_img_weight: see ``condition_tokens``.
            sca, crp: size conditions ``[N]`` or scalars; None counts as 0, which is what the release samples with.
            decoupled: what IP-Adapters add (`IPAdapter.attention`), each for all ``N`` conditions or for one.
        """
        condition = self.condition_tokens(clip_text, clip_text_pooled, clip_img, clip_img_weight)
        return self.prepare_blocks(timesteps, condition, {"sca": sca, "crp": crp}, decoupled)

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor | None = None,
        clip_img: Tensor | None = None,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: ControlResiduals | None = None,
        decoupled: Sequence[DecoupledAttention] = (),
    ) -> Tensor:
        """Predict the noise of latents ``x [B, 16, h, w]`` at noise conditions ``r [B]`` (0 clean to 1 noise)."""
        prepared = self.prepare(r[None], clip_text, clip_text_pooled, clip_img, sca, crp, decoupled)
        return self.step(x, prepared, 0, control)
