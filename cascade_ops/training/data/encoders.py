"""What a batch holds beside pictures and captions: latents, text states and picture embeddings, by frozen models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...handles import StageHandle
from ...models.effnet import normalize_imagenet
from ...sizes import encoder_picture_size, stage_c_size
from ...threads import threads_for
from ...tokenizer import pad_tokens
from ...vision import encode_pictures
from ..parts import Parts

# What is encoded, and by which stage.
ENCODED_BY = {
    "stage_c_latent": "latent_encoder",
    "stage_a_latent": "stage_a",
    "image_embedding": "image_encoder",
    "text": "text_encoder",
    "text_pooled": "text_encoder",
}
OF_PICTURES = ("stage_c_latent", "stage_a_latent", "image_embedding")
OF_CAPTIONS = ("text", "text_pooled")


class Encoders:
    """The frozen encoders of a run on one device, loaded when they are first asked for. Everything that comes back is
    float32 in main memory."""

    def __init__(self, parts: Parts, device: torch.device | str = "cpu"):
        self._parts, self._device = parts, torch.device(device)
        self._handles: dict[str, StageHandle] = {}
        self._fingerprints: dict[str, str] = {}

    def handle(self, stage: str) -> StageHandle:
        """The encoder on the device."""
        if stage not in self._handles:
            self._handles[stage] = self._parts.load(stage).to(self._device)
        return self._handles[stage]

    def release(self) -> None:
        """Let go of the copies on the device."""
        self._handles.clear()

    def fingerprint(self, stage: str) -> str:
        """Changes with anything that the encoder's answers depend on: weights, their dtype, configuration, tokens."""
        if stage not in self._fingerprints:
            self._fingerprints[stage] = fingerprint(self.handle(stage))
        return self._fingerprints[stage]

    def pictures(self, kind: str, images: Tensor) -> Tensor:
        """One of OF_PICTURES for pictures ``[B, 3, H, W]``, 0..1."""
        return {
            "stage_c_latent": self.stage_c_latent,
            "stage_a_latent": self.stage_a_latent,
            "image_embedding": self.image_embedding,
        }[kind](images)

    @torch.no_grad()
    def stage_c_latent(self, images: Tensor) -> Tensor:
        """Stage C latents ``[B, 16, h, w]`` of pictures ``[B, 3, H, W]``, 0..1.

        The encoder sees the picture at 3/4 of its size, smoothly shrunk, so that 128 / 3 pixels are one cell.
        """
        handle = self.handle("latent_encoder")
        size = encoder_picture_size(*stage_c_size(*images.shape[-2:]))
        small = F.interpolate(images.to(self._device), size=size, mode="bilinear", antialias=True)
        with threads_for(handle):
            return handle.module(normalize_imagenet(small).to(handle.dtype)).float().cpu()

    @torch.no_grad()
    def stage_a_latent(self, images: Tensor) -> Tensor:
        """Stage A latents ``[B, 4, H / 4, W / 4]``, as Stage B is trained on them."""
        handle = self.handle("stage_a")
        with threads_for(handle):
            return handle.module.encode(images.to(self._device, handle.dtype))[0].float().cpu()

    @torch.no_grad()
    def image_embedding(self, images: Tensor) -> Tensor:
        """CLIP embeddings ``[B, 1, E]`` of pictures, see `vision.encode_pictures`."""
        return encode_pictures(self.handle("image_encoder"), images).cpu()

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, 77, C]`` and pooled states ``[B, 1, P]`` of captions, cut to 75 tokens.

        Captions are plain text: brackets and colons in them mean nothing, unlike in a prompt.
        """
        handle = self.handle("text_encoder")
        encoder = handle.module
        padded = [pad_tokens(encoder.tokenizer.encode(text)[: encoder.length - 2], encoder.length) for text in captions]
        ids, mask = (torch.tensor(rows) for rows in zip(*padded, strict=True))
        with threads_for(handle):
            hidden, pooled = encoder.encode_tokens(ids, mask)
        return hidden.cpu(), pooled[:, None].cpu()


def fingerprint(handle: StageHandle) -> str:
    """A hash of a stage's weights with their names and dtypes, its configuration and its learned tokens."""
    digest = hashlib.blake2b(digest_size=16)
    tokenizer = getattr(handle.module, "tokenizer", None)
    about = [handle.stage, handle.info.config, getattr(tokenizer, "added_tokens", ())]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(handle.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
