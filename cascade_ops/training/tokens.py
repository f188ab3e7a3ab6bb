"""Learned tokens that are being trained: rows of the text encoder's token table that change, the rest stays.

Source: Gal et al., "An Image is Worth One Word" (2022), in the form of the reference (``train/train_c_lora.py``), which
trains the change of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapters.tokens import LearnedToken, start_vectors
from ..handles import StageHandle
from ..text import TextEmbedding, TextEncoder
from .lora_layers import private_copy
from .settings import Token


class TrainedTokens(nn.Module):
    """A frozen text encoder with tokens that learn.

    handle: a text encoder of any float dtype; its weights are shared and stay as they are. tokens: what to learn.
    start: tokens learned before to go on with.

    Raises:
        ValueError: a token that cannot be learned, see `adapters.tokens.start_vectors`; one that is named twice or has
            no vectors; one in `start` that is not in `tokens`, or of another number of vectors.
    """

    def __init__(self, handle: StageHandle, tokens: Sequence[Token], start: Sequence[LearnedToken] = ()):
        super().__init__()
        encoder: TextEncoder = handle.expect("text_encoder").module
        self.handle, self.settings = handle, tuple(tokens)
        self.network = private_copy(encoder.module)
        names = [token.token.lower() for token in tokens]
        files = [token.token.strip("[]<>").lower() for token in tokens]
        if len(set(files)) < len(files):
            twice = next(token.token for token in tokens if files.count(token.token.strip("[]<>").lower()) > 1)
            raise ValueError(f"The token {twice!r} is named twice, expected each once: remove or rename one.")
        if none := [token for token in tokens if token.vectors < 1]:
            raise ValueError(
                f"The token {none[0].token!r} is to have {none[0].vectors} vectors, expected at least 1: change it."
            )
        known = {token.token.lower(): token for token in start}
        if unknown := known.keys() - set(names):
            raise ValueError(
                f"The file to go on with has learned the token {sorted(unknown)[0]!r}, which the run's tokens lack: "
                "name it there too."
            )
        rows = [start_vectors(token.token, token.init, token.vectors, encoder) for token in tokens]
        deltas = [torch.zeros_like(row) for row in rows]
        for place, name in enumerate(names):
            if name in known:
                deltas[place] = _delta(known[name], encoder, rows[place])
        self.counts = [len(row) for row in rows]
        self.register_buffer("start", torch.cat(rows), persistent=False)
        self.delta = nn.Parameter(torch.cat(deltas))
        # Making a tokenizer takes long; later ones only get other vectors.
        self._encoder = encoder.with_module(self.network).with_tokens(self._by_token(self.start))

    def encoder(self, trained: bool = True) -> TextEncoder:
        """The text encoder with the tokens as they are; trained: gradients flow back to them."""
        vectors = self.start + self.delta
        if not trained:
            vectors = vectors.detach()
        return self._encoder.with_tokens(self._by_token(vectors))

    def _by_token(self, vectors: Tensor) -> dict[str, Tensor]:
        return {token.token: rows for token, rows in zip(self.settings, vectors.split(self.counts), strict=True)}

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """The captions, each cut to one sequence: `hidden` [B, 77, C], `pooled` [B, P]."""
        hidden, pooled = self.encoder().encode_captions(captions)
        # Without it a batch that names no token would give the tokens no gradient, which several processes must agree
        # on.
        return TextEmbedding(hidden + 0 * self.delta.sum(), pooled)

    def share_named(self, captions: Sequence[str]) -> Tensor:
        """The share of the captions that name a token: 0 means that nothing is learned."""
        known = self._encoder.learned.keys()
        named = [not known.isdisjoint(self._encoder.tokenizer.encode(caption)) for caption in captions]
        return torch.tensor(sum(named) / len(named))

    def learned(self) -> tuple[LearnedToken, ...]:
        """The tokens as they are now."""
        deltas = self.delta.detach().float().cpu().clone().split(self.counts)
        starts = self.start.cpu().split(self.counts)
        return tuple(
            LearnedToken(token.token, token.init, start + delta, delta)
            for token, start, delta in zip(self.settings, starts, deltas, strict=True)
        )

    def text_encoder(self) -> StageHandle:
        """A handle of the text encoder with the tokens as they are now, on this module's device."""
        return replace(self.handle, module=self.encoder(trained=False), runs_on=None)


def _delta(token: LearnedToken, encoder: TextEncoder, start: Tensor) -> Tensor:
    """The change to go on with, from where the run's token starts."""
    if token.count != len(start):
        raise ValueError(
            f"The token {token.token!r} to go on with has {token.count} vectors and the run's {len(start)}: set its "
            "'vectors' to the same number."
        )
    vectors = token.completed(encoder).vectors
    assert vectors is not None
    return vectors - start
