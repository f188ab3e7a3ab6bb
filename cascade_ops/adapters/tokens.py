"""Learned tokens: what they are, their files, and a text encoder that knows them.

Two forms are in use. Textual inversion (Gal et al., "An Image is Worth One Word", 2022) stores vectors, which prompts
name as ``embedding:name``. The reference's trainer (``modules/lora.py`` in Stability-AI/StableCascade) stores what is
added to rows of the token table: that of an existing word, or for a new token the mean of the rows of its initial
words.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.saving import write_tensors
from ..handles import StageHandle
from ..text import TextEncoder
from ..tokenizer import default_tokenizer, is_new_token, token_id

TOKENS_KEY = "cascade.tokens"


@dataclass(frozen=True, eq=False)
class LearnedToken:
    """One learned token, float32: `vectors` ``[n, C]`` that take n places in a prompt, or `delta`, what they differ by
    from where they started, or both.

    token: ``[name]`` or ``<name>``, or a word of the vocabulary; empty where a file does not say. init: the words that
    a new one started as. row: its id in the trainer's token table, where that is known.
    """

    token: str
    init: str = ""
    vectors: Tensor | None = None
    delta: Tensor | None = None
    row: int | None = None

    def __post_init__(self) -> None:
        if self.token:
            is_new_token(self.token)
        if self.vectors is None and self.delta is None:
            raise ValueError(f"The learned token {self.token!r} has neither vectors nor a delta: give one of them.")
        if self.vectors is not None and self.delta is not None and self.vectors.shape != self.delta.shape:
            raise ValueError(
                f"The learned token {self.token!r} has vectors {list(self.vectors.shape)} and a delta "
                f"{list(self.delta.shape)}: they must be of one shape."
            )

    @property
    def name(self) -> str:
        """The token without brackets: what its embedding file is called."""
        return self.token.strip("[]<>")

    @property
    def count(self) -> int:
        """How many places it takes in a prompt."""
        rows = self.vectors if self.vectors is not None else self.delta
        assert rows is not None
        return len(rows)

    def completed(self, encoder: TextEncoder) -> LearnedToken:
        """With both forms, from the token table of the text encoder that it was learned with.

        Raises:
            ValueError: the token has no name, so where it started is not known, or it is of another width.
        """
        if not self.token:
            raise ValueError(
                "The file does not say which word its learned token is, expected the token and the words that it "
                "started as: give them as in the training configuration, such as [name] and dog."
            )
        start = start_vectors(self.token, self.init, self.count, encoder)
        for rows in (self.vectors, self.delta):
            if rows is not None and rows.shape != start.shape:
                raise ValueError(
                    f"The learned token {self.token!r} is {rows.shape[1]} numbers wide, this text encoder "
                    f"{encoder.width}: use the text encoder that it was learned with."
                )
        if self.vectors is None:
            assert self.delta is not None
            return replace(self, vectors=start + self.delta)
        return replace(self, delta=self.vectors - start) if self.delta is None else self


def start_vectors(token: str, init: str, count: int, encoder: TextEncoder) -> Tensor:
    """Where a learned token starts, float32 ``[count, C]``: the row of an existing word, or for a new token the mean of
    the rows of the words in `init`; zeros without any, as in the reference.

    Raises:
        ValueError: see `tokenizer.is_new_token` and `token_id`; `init` for an existing word.
    """
    table = encoder.module.text_model.embeddings.token_embedding.weight.detach()
    tokenizer = default_tokenizer()
    if not is_new_token(token):
        if init:
            raise ValueError(
                f"The token {token!r} is an existing word and starts as itself, and was given the initial words "
                f"{init!r}: leave them out, or write it in brackets as a new token."
            )
        ids = [token_id(token, tokenizer)]
    else:
        ids = tokenizer.encode(init)
    start = table[ids].float().mean(0) if ids else table.new_zeros(table.shape[1], dtype=torch.float32)
    return start.repeat(count, 1)


def with_tokens(handle: StageHandle, tokens: Iterable[LearnedToken]) -> StageHandle:
    """The text encoder of `handle` with learned tokens: a prompt with ``[name]`` in it uses them. It shares all
    weights; a token that was learned before is replaced.

    Raises:
        ValueError: see `LearnedToken.completed`.
    """
    encoder: TextEncoder = handle.expect("text_encoder").module
    vectors = {}
    for token in tokens:
        complete = token.completed(encoder)
        assert complete.vectors is not None
        vectors[complete.token] = complete.vectors
    return replace(handle, module=encoder.with_tokens(vectors)) if vectors else handle


def write_embedding(path: str | Path, token: LearnedToken) -> Path:
    """Write the vectors as a textual-inversion file that prompts name as ``embedding:name``, here and in ComfyUI: one
    tensor ``clip_g [n, C]``. The file appears under its name when it is complete.

    Raises:
        ValueError: the token has no vectors yet, see `LearnedToken.completed`.
    """
    path, vectors = Path(path), vectors_of(token)
    metadata = {"format": "pt", "cascade.stage": "embedding", **tokens_metadata([token], data=False)}
    write_tensors(path, {"clip_g": (torch.float32, tuple(vectors.shape), lambda: vectors)}, metadata)
    return path


def vectors_of(token: LearnedToken) -> Tensor:
    """The vectors, float32 on the CPU; ValueError where only the delta is known."""
    if token.vectors is None:
        raise ValueError(
            f"The learned token {token.token!r} is known as a change of the token table only, expected vectors: "
            "complete it with the text encoder that it was learned with."
        )
    return token.vectors.detach().float().cpu().contiguous()


def delta_of(token: LearnedToken) -> Tensor:
    """The change of the token table's row, float32 on the CPU; ValueError where only the vectors are known."""
    if token.delta is None:
        raise ValueError(
            f"The learned token {token.token!r} is known as vectors only, expected its change of the token table: "
            "complete it with the text encoder that it was learned with."
        )
    return token.delta.detach().float().cpu().contiguous()


def tokens_metadata(tokens: Sequence[LearnedToken], *, data: bool = True) -> dict[str, str]:
    """What a file's metadata says about its tokens; data: with their numbers."""
    entries = []
    for token in tokens:
        entry: dict = {"token": token.token, "init": token.init}
        if token.row is not None:
            entry["row"] = token.row
        for kind in ("vectors", "delta"):
            rows = getattr(token, kind)
            if data and rows is not None:
                entry[kind] = _as_text(rows)
        entries.append(entry)
    return {TOKENS_KEY: json.dumps(entries, ensure_ascii=False)} if entries else {}


def tokens_from_metadata(metadata: Mapping[str, str], name: str) -> list[dict]:
    """The entries that `tokens_metadata` wrote, as arguments of `LearnedToken`; `name` of the file for messages."""
    try:
        entries = json.loads(metadata.get(TOKENS_KEY, "[]"))
        return [
            {
                "token": str(entry["token"]),
                "init": str(entry.get("init", "")),
                "row": entry.get("row"),
                **{kind: _from_text(entry[kind]) for kind in ("vectors", "delta") if kind in entry},
            }
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} describes its learned tokens in a way that is not understood ({error}), expected what training "
            f"writes under '{TOKENS_KEY}' in the metadata: save the file again."
        ) from error


def reference_tokens(
    tensors: Mapping[str, Tensor], said: Sequence[Mapping] = (), name: str = ""
) -> tuple[LearnedToken, ...]:
    """The tokens of the reference's form, ``embeddings.embeddings [n, C]`` for the rows ``embeddings.indices [n]``.

    said: what else is known of each, in order. Existing words get their text from the vocabulary.
    """
    if "embeddings.embeddings" not in tensors:
        return ()
    deltas, rows = tensors["embeddings.embeddings"].float(), tensors["embeddings.indices"].tolist()
    if len(deltas) != len(rows) or (said and len(said) != len(rows)):
        raise ValueError(
            f"{name or 'The file'} holds {len(deltas)} learned rows for {len(rows)} indices and says what "
            f"{len(said)} of them are, expected as many of each: give one token for each learned row."
        )
    tokens = []
    for place, (delta, row) in enumerate(zip(deltas, rows, strict=True)):
        known = dict(said[place]) if said else {"token": default_tokenizer().word(row)}
        tokens.append(LearnedToken(**{**known, "delta": delta[None], "row": row}))
    return tuple(tokens)


def _as_text(rows: Tensor) -> dict:
    """Numbers as text: the metadata of a file holds nothing else."""
    data = rows.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()
    return {"shape": list(rows.shape), "float32": base64.b64encode(data).decode("ascii")}


def _from_text(entry: Mapping) -> Tensor:
    data = bytearray(base64.b64decode(entry["float32"], validate=True))
    return torch.frombuffer(data, dtype=torch.float32).reshape(entry["shape"]).clone()
