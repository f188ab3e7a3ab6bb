"""From a prompt to the positions of the text encoder: words, weights, learned vectors, and chunks for long prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike
from typing import NamedTuple

import torch

from .prompt_weights import parse_prompt
from .text_embeddings import load_embedding
from .tokenizer import WHITE_SPACE, ClipTokenizer

WHOLE_WORD_LIMIT = 8  # a word of this many tokens or more may be cut between two chunks

_WORD = re.compile(f"[^{WHITE_SPACE}]+")
_EMBEDDING = re.compile(f"(?:^|(?<=[{WHITE_SPACE}]))embedding:[{WHITE_SPACE}]*([^{WHITE_SPACE}]*)")

FindEmbedding = Callable[[str], "str | PathLike[str] | None"]


class Position(NamedTuple):
    """One place of the sequence: a token id or a learned vector [C], and its weight."""

    content: int | torch.Tensor
    weight: float


def read_prompt(
    prompt: str,
    tokenizer: ClipTokenizer,
    width: int,
    find_embedding: FindEmbedding | None = None,
    learned: Mapping[int, torch.Tensor] | None = None,
) -> list[list[Position]]:
    """The positions of a prompt, grouped by word (or by embedding), without start and end.

    `find_embedding` gives the path of a name, or None. `learned` has the vectors [n, width] that stand in for some
    token ids. Raises ValueError where the prompt names an embedding that is not found, or whose vectors are not `width`
    wide.
    """
    groups = []
    for text, weight in parse_prompt(prompt):
        done = 0
        for match in _EMBEDDING.finditer(text):
            groups += read_words(text[done : match.start()], tokenizer, learned, weight)
            vectors, rest = _find(match.group(1), find_embedding, width)
            groups.append([Position(vector, weight) for vector in vectors])
            groups += read_words(rest, tokenizer, learned, weight)
            done = match.end()
        groups += read_words(text[done:], tokenizer, learned, weight)
    return groups


def read_words(
    text: str, tokenizer: ClipTokenizer, learned: Mapping[int, torch.Tensor] | None = None, weight: float = 1.0
) -> list[list[Position]]:
    """The positions of plain text, where parentheses are no weights, by word; see `read_prompt` for `learned`."""
    vectors = learned or {}
    words = (tokenizer.encode(word) for word in _WORD.findall(text))
    return [
        [Position(content, weight) for token in tokens for content in vectors.get(token, (token,))] for tokens in words
    ]


def split_chunks(groups: list[list[Position]], capacity: int = 75) -> list[list[Position]]:
    """Fill chunks of at most `capacity` positions in order; there is always one, which may be empty.

    A word of fewer than 8 tokens is not cut: it moves to the next chunk as a whole. Longer ones fill the chunk up.
    """
    chunks: list[list[Position]] = [[]]
    for group in groups:
        room = capacity - len(chunks[-1])
        if len(group) > room and len(group) < min(WHOLE_WORD_LIMIT, capacity + 1):
            chunks.append([])
            room = capacity
        while len(group) > room:
            chunks[-1].extend(group[:room])
            group, room = group[room:], capacity
            chunks.append([])
        chunks[-1].extend(group)
    return chunks


def _find(name: str, find_embedding: FindEmbedding | None, width: int) -> tuple[torch.Tensor, str]:
    """The vectors of an embedding and what follows its name: commas belong to the name only if there is such a file."""
    if not name:
        raise ValueError("The prompt says embedding: without a name; write embedding:name, or leave it out.")
    if find_embedding is None:
        raise ValueError(
            f"The prompt asks for the embedding {name!r}, but no place to look for embeddings was given; "
            "pass find_embedding, or leave embedding: out of the prompt."
        )
    for candidate in dict.fromkeys((name, name.rstrip(","))):
        path = find_embedding(candidate) if candidate else None
        if path is not None:
            return load_embedding(path, width), name[len(candidate) :]
    raise ValueError(
        f"The prompt asks for the embedding {name.rstrip(',')!r}, which was not found; put the file "
        f"{name.rstrip(',')}.safetensors into the embeddings folder, or correct the name in the prompt."
    )
