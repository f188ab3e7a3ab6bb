"""Learned tokens: what they are, their files, and a text encoder that knows them.

Two forms are in use. Textual inversion (Gal et al., "An Image is Worth One Word", 2022) stores vectors, which prompts
name as ``embedding:name``. The reference's trainer (``modules/lora.py`` in Stability-AI/StableCascade) stores what is
added to rows of the token table: that of an existing word, or for a new token the mean of the rows of its initial
words.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.saving import write_tensors
from ..handles import StageHandle
from ..text import TextEncoder
from ..tokenizer import VOCABULARY_SIZE, default_tokenizer, is_new_token, token_id
from .merging import with_vectors

TOKENS_KEY = "cascade.tokens"
# What no plain word has in it: such initial words are a regular expression.
_PATTERN = re.compile(r"[\^$*+?\\|(){}<>/]")


@dataclass(frozen=True, eq=False)
class LearnedToken:
    """One learned token, float32: `vectors` ``[n, C]`` that take n places in a prompt, or `delta`, what they differ by
    from where they started, or both.

    token: ``[name]`` or ``<name>``, or a word of the vocabulary; empty where a file does not say, and for a piece of a
    word, which only its row tells. init: the words that a new one started as, or the reference's regular expression for
    them (see `start_vectors`). row: its id in the trainer's token table, where that is known.
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

    @property
    def is_new(self) -> bool:
        """Whether it is a word of its own and not one of the vocabulary, or a piece of one."""
        if self.token:
            return is_new_token(self.token)
        return self.row is None or self.row >= VOCABULARY_SIZE

    def completed(self, encoder: TextEncoder) -> LearnedToken:
        """With both forms, from the token table of the text encoder that it was learned with.

        Raises:
            ValueError: the token has no name, so where it started is not known, or it is of another width.
        """
        if not self.token and self.is_new:
            raise ValueError(
                "The file does not say which word its learned token is, expected the token and the words that it "
                "started as: give them as in the training configuration, such as [name] and dog."
            )
        if self.token:
            start = start_vectors(self.token, self.init, self.count, encoder)
        else:
            start = _table(encoder)[[self.row]].float()
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

    init: words, or with other characters in it the regular expression of the reference's training configuration, such
    as ``^dog</w>``, which means every token of the vocabulary that it is found in.

    Raises:
        ValueError: see `tokenizer.is_new_token` and `token_id`; `init` for an existing word, or one that finds nothing.
    """
    table = _table(encoder)
    tokenizer = default_tokenizer()
    if not is_new_token(token):
        if init:
            raise ValueError(
                f"The token {token!r} is an existing word and starts as itself, and was given the initial words "
                f"{init!r}: leave them out, or write it in brackets as a new token."
            )
        ids = [token_id(token, tokenizer)]
    else:
        ids = _initial_ids(init)
    start = table[ids].float().mean(0) if ids else table.new_zeros(table.shape[1], dtype=torch.float32)
    return start.repeat(count, 1)


def _table(encoder: TextEncoder) -> Tensor:
    return encoder.module.text_model.embeddings.token_embedding.weight.detach()


def _initial_ids(init: str) -> list[int]:
    tokenizer = default_tokenizer()
    if not _PATTERN.search(init):
        return tokenizer.encode(init)
    ids = tokenizer.matching(init)
    if not ids:
        raise ValueError(
            f"The initial word {init!r} is a regular expression that is found in no token of the vocabulary, expected "
            "one as in the training configuration, such as ^dog</w>: correct it, or leave it empty to start from zeros."
        )
    return ids


def given_names(tokens: str, initial_words: str) -> list[tuple[str, str]]:
    """Names and initial words of learned tokens from two texts with commas between them: ``[a], [b]`` and ``dog, cat``.
    No initial words at all are none for each.

    Raises:
        ValueError: as many initial words as names were expected.
    """
    names = [word.strip() for word in tokens.split(",") if word.strip()]
    initial = [word.strip() for word in initial_words.split(",")] if initial_words.strip() else [""] * len(names)
    if len(names) != len(initial):
        raise ValueError(
            f"{len(initial)} initial words ({initial_words.strip()}) were given for {len(names)} learned words "
            f"({tokens.strip() or 'none'}), expected one for each: separate them by commas, and leave none or all out."
        )
    return list(zip(names, initial, strict=True))


def renamed(tokens: Sequence[LearnedToken], names: Sequence[tuple[str, str]], file: str) -> tuple[LearnedToken, ...]:
    """The tokens of a file with other names: name and initial words of each new one, or of each token.

    New ones are meant in the order in which they were configured, which is that of their rows where a file has them.

    Raises:
        ValueError: as many names as new tokens were expected; initial words for a token that says where it started.
    """
    if not names:
        return tuple(tokens)
    meant = [place for place, token in enumerate(tokens) if token.is_new]
    meant.sort(key=lambda place: tokens[place].row or 0)  # the original trainer's files have them in any order
    if len(names) != len(meant):
        meant = list(range(len(tokens)))
    if len(names) != len(meant):
        new = sum(token.is_new for token in tokens)
        raise ValueError(
            f"{file} holds {new} learned words that are new, and {len(names)} names were given "
            f"({', '.join(name for name, _ in names)}): give one for each, in the order of training, or none."
        )
    result = list(tokens)
    for place, (name, init) in zip(meant, names, strict=True):
        token = result[place]
        if init and init != token.init and (token.token or token.vectors is not None):
            raise ValueError(
                f"{file} says itself what its learned word {token.token} started as, and was given the initial word "
                f"{init!r}: leave it out."
            )
        result[place] = replace(token, token=name, init=init or token.init)
    return tuple(result)


def with_tokens(handle: StageHandle, tokens: Iterable[LearnedToken]) -> StageHandle:
    """The text encoder of `handle` with learned tokens: a prompt with ``[name]`` in it uses them. It shares all
    weights; a token that was learned before is replaced.

    Raises:
        ValueError: see `LearnedToken.completed`.
    """
    encoder: TextEncoder = handle.expect("text_encoder").module
    vectors: dict[str | int, Tensor] = {}
    for token in tokens:
        complete = token.completed(encoder)
        assert complete.vectors is not None
        key = complete.token or complete.row
        assert key is not None
        vectors[key] = complete.vectors
    return with_vectors(handle, vectors) if vectors else handle


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

    said: what else the file knows of each, in order. Existing words get their text from the vocabulary.
    """
    if "embeddings.embeddings" not in tensors:
        return ()
    deltas, rows = tensors["embeddings.embeddings"].float(), tensors["embeddings.indices"].tolist()
    if len(deltas) != len(rows) or (said and len(said) != len(rows)):
        raise ValueError(
            f"{name or 'The file'} holds {len(deltas)} learned rows for {len(rows)} indices and says what "
            f"{len(said)} of them are, expected as many of each: save the file again."
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
