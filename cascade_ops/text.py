"""The CLIP text encoder: a prompt in, what Stages C and B are conditioned on out.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4;
the published model is OpenCLIP's ViT-bigG/14 (hidden 1280, 32 layers, 20 heads). Stage C takes the last layer's hidden
states before the final norm, and the projected state at the end token; Stage B takes only the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .prompt_chunks import FindEmbedding, Position, read_prompt, read_words, split_chunks
from .text_model import build_text_model
from .tokenizer import END_TOKEN, SEQUENCE_LENGTH, ClipTokenizer, default_tokenizer, is_new_token, pad_tokens, token_id

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection


class TextEmbedding(NamedTuple):
    """An encoded prompt, float32: `hidden` [1, 77 * chunks, C] and `pooled` [1, P]."""

    hidden: torch.Tensor
    pooled: torch.Tensor


class TextEncoder:
    """A CLIP text model with its tokenizer. Immutable: `to` gives another handle."""

    def __init__(
        self,
        module: CLIPTextModelWithProjection,
        tokenizer: ClipTokenizer | None = None,
        runs_on: torch.device | None = None,
        learned: Mapping[int, torch.Tensor] | None = None,
    ):
        """`module` is in eval mode and on one device, see `from_state_dict`; or its layers fetch their weights to the
        device that `runs_on` says. `learned` has vectors [n, C] that stand in for some of the tokenizer's ids, for all
        that it added among them."""
        self.module = module
        self.tokenizer = tokenizer or default_tokenizer()
        self.learned = dict(learned or {})
        self._runs_on = runs_on

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> TextEncoder:
        """Build from tensors under transformers' names, which are shared and not copied unless `dtype` differs.

        Any width, depth and projection, read from the shapes. See `text_model.build_text_model` for `config`, for token
        tables that store only some rows, and for the errors.
        """
        return cls(build_text_model(state_dict, config, dtype))

    @property
    def width(self) -> int:
        """The width C of the hidden states."""
        return self.module.config.hidden_size

    @property
    def pooled_width(self) -> int:
        """The width P of the pooled, projected state."""
        return self.module.text_projection.out_features

    @property
    def length(self) -> int:
        """The longest sequence, start and end included: 77 for CLIP."""
        return min(self.module.config.max_position_embeddings, SEQUENCE_LENGTH)

    @property
    def device(self) -> torch.device:
        return self._runs_on or self.module.text_projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.text_projection.weight.dtype

    def to(self, device: torch.device | str) -> TextEncoder:
        """The encoder on `device`: this handle if it is there already, else a new one; this one stays where it is."""
        if self.device == torch.empty(0, device=device).device:
            return self
        config = self.module.config.to_dict()
        return self.with_module(build_text_model(self.module.state_dict(), config, device=device))

    def with_module(self, module: CLIPTextModelWithProjection, runs_on: torch.device | None = None) -> TextEncoder:
        """The same tokens with another text model; see the constructor."""
        return TextEncoder(module, self.tokenizer, runs_on, self.learned)

    def with_tokens(self, vectors: Mapping[str | int, torch.Tensor]) -> TextEncoder:
        """The encoder with learned tokens: a word's text, or its id, -> the vectors [n, C] that stand for it, of n
        positions.

        A word in brackets such as `[name]` is new, or learned already and learned anew; another one must be one token
        of the vocabulary. Raises ValueError for one that is not, and for vectors of another width.
        """
        known = {token.lower() for token in self.tokenizer.added_tokens}
        words = [token for token in vectors if isinstance(token, str)]
        new = [token for token in words if is_new_token(token) and token.lower() not in known]
        tokenizer = self.tokenizer.with_tokens(new) if new else self.tokenizer
        learned = dict(self.learned)
        for token, rows in vectors.items():
            if rows.ndim != 2 or rows.shape[1] != self.width or not len(rows):
                raise ValueError(
                    f"The learned token {token!r} has vectors of shape {list(rows.shape)}; this text encoder takes "
                    f"vectors of width {self.width}: use a token that was learned with it."
                )
            learned[token_id(token, tokenizer) if isinstance(token, str) else token] = rows
        return TextEncoder(self.module, tokenizer, self._runs_on, learned)

    def encode(self, prompt: str, find_embedding: FindEmbedding | None = None) -> TextEmbedding:
        """Encode one prompt with weights, embeddings and any length, on this encoder's device.

        A prompt of more than 75 tokens is encoded in chunks of 75, each with its own start and end; the hidden states
        follow each other and the pooled state is the first chunk's. A weight moves the hidden states of its tokens away
        from those of the empty prompt at the same positions, or towards them (ComfyUI's rule):
        empty + weight * (hidden - empty). The pooled state has no weights. `find_embedding(name)` gives the path of the
        file that the prompt means by `embedding:name`, or None; see `prompt_chunks.read_prompt` for the errors.
        """
        words = read_prompt(prompt, self.tokenizer, self.width, find_embedding, self.learned)
        chunks = split_chunks(words, self.length - 2)
        weighted = any(position.weight != 1.0 for chunk in chunks for position in chunk)
        rows = [*chunks, []] if weighted else chunks
        ids, mask, vectors = self._lay_out(rows)
        hidden, pooled = self._forward(ids, mask, vectors)
        if weighted:
            hidden, empty = hidden[:-1], hidden[-1]
            weights = torch.ones(hidden.shape[:2])
            for row, chunk in enumerate(chunks):
                weights[row, 1 : len(chunk) + 1] = torch.tensor([position.weight for position in chunk])
            weights = weights.to(hidden.device)[..., None]
            hidden = torch.where(weights == 1, hidden, empty + weights * (hidden - empty))
        return TextEmbedding(hidden.reshape(1, -1, self.width), pooled[:1])

    def encode_tokens(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids [B, T <= 77] with their attention mask [B, T] (1 = used, 0 = padding).

        Gives the hidden states [B, T, C] before the final norm and the projected state at the first end token [B, P],
        in float32. Raises ValueError for other shapes and for a row without an end token.
        """
        if ids.ndim != 2 or ids.shape != mask.shape or not 1 <= ids.shape[1] <= self.length:
            raise ValueError(
                f"Token ids of shape {list(ids.shape)} with a mask of shape {list(mask.shape)} were given; expected "
                f"both as [batch, up to {self.length}]: pad the ids with pad_tokens."
            )
        if not (ids == END_TOKEN).any(1).all():
            raise ValueError(f"A row of token ids has no end token {END_TOKEN}; pad the ids with pad_tokens.")
        return self._forward(ids, mask, [])

    def encode_captions(self, captions: Sequence[str]) -> TextEmbedding:
        """Encode plain captions, each cut to one sequence: `hidden` [B, 77, C] and `pooled` [B, P].

        Parentheses are no weights here, and embeddings cannot be named. Gradients flow back to the learned vectors that
        ask for them.
        """
        rows = []
        for caption in captions:
            groups = read_words(caption, self.tokenizer, self.learned)
            rows.append([position for group in groups for position in group][: self.length - 2])
        return TextEmbedding(*self._run(*self._lay_out(rows)))

    def _lay_out(
        self, chunks: list[list[Position]]
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, torch.Tensor]]]:
        """Ids [B, T], mask [B, T], and the learned vectors with their row and place."""
        ids, mask, vectors = [], [], []
        for row, chunk in enumerate(chunks):
            tokens = []
            for place, (content, _) in enumerate(chunk, start=1):
                if isinstance(content, torch.Tensor):
                    vectors.append((row, place, content))
                    content = 0  # any token but the end: the vector replaces it
                tokens.append(content)
            row_ids, row_mask = pad_tokens(tokens, self.length)
            ids.append(row_ids)
            mask.append(row_mask)
        return torch.tensor(ids), torch.tensor(mask), vectors

    @torch.no_grad()
    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, vectors: list[tuple[int, int, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(ids, mask, vectors)

    def _run(
        self, ids: torch.Tensor, mask: torch.Tensor, vectors: list[tuple[int, int, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of the text model in order.

        Not the model's own forward: it takes no vectors, and which hidden states it returns, and which end token it
        pools at, differ between versions of transformers.
        """
        model = self.module.text_model
        ids, mask = ids.to(self.device), mask.to(self.device)
        tokens = model.embeddings.token_embedding(ids)
        for row, place, vector in vectors:
            tokens[row, place] = vector.to(tokens)
        # The model's own position ids stay behind where its layers fetch their weights.
        hidden = model.embeddings(
            inputs_embeds=tokens, position_ids=torch.arange(ids.shape[1], device=self.device)[None]
        )
        hidden = model.encoder(inputs_embeds=hidden, attention_mask=_attention_bias(mask, hidden.dtype))[0]
        end = (ids == END_TOKEN).int().argmax(1)
        last = model.final_layer_norm(hidden[torch.arange(len(ids), device=self.device), end])
        return hidden.float(), self.module.text_projection(last).float()


def _attention_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Added to the scores, [B, 1, T, T]: 0 where a token looks (itself and before, no padding), else the least."""
    length = mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask.bool()[:, None, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill(~allowed, torch.finfo(dtype).min)
