"""CLIP's byte-pair tokenizer over the vocabulary in `data/clip_merges.txt.gz`; nothing is fetched.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4, and
the published tokenizer settings. The `tokenizers` library (a dependency of transformers) does the work.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

START_TOKEN = 49406
END_TOKEN = 49407  # also the padding
VOCABULARY_SIZE = 49408
SEQUENCE_LENGTH = 77

# What counts as white space for CLIP: Unicode's White_Space. Python's str.split differs (it also splits at U+001C..1F).
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

_DATA_FILE = Path(__file__).parent / "data" / "clip_merges.txt.gz"
_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
# Contractions, runs of letters, single digits, runs of anything else that is not white space.
_WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Text to token ids, equal to CLIP's own tokenizer. Immutable.

    `<|startoftext|>` and `<|endoftext|>` written in a text are those tokens, in any case, as in the original.
    """

    def __init__(self, added_tokens: Sequence[str] = ()):
        """`added_tokens` (learned tokens such as `[fernando]`, matched in any case) get the ids from 49408 on.

        Raises ValueError for a token that is empty, contains white space or exists already.
        """
        self.added_tokens = tuple(added_tokens)
        known = set(_SPECIAL_TOKENS)
        for token in self.added_tokens:
            if not token or re.search(f"[{WHITE_SPACE}]", token):
                raise ValueError(f"The learned token {token!r} must be one word without spaces; rename it.")
            if token.lower() in known:
                raise ValueError(f"The learned token {token!r} exists already; give each learned token its own name.")
            known.add(token.lower())
        self._backend = _build_backend(self.added_tokens)

    def __len__(self) -> int:
        """The number of ids: 49408 and one for each added token."""
        return VOCABULARY_SIZE + len(self.added_tokens)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, of any length, without start, end or padding.

        Halves of surrogate pairs that stand alone, which are not Unicode text, count as U+FFFD.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._backend.encode(text, add_special_tokens=False).ids

    def word(self, token: int) -> str:
        """The word that is this one token; empty for a piece of a word."""
        piece = self._backend.id_to_token(token) or ""
        word = piece.removesuffix("</w>")
        return word if self.encode(word) == [token] else ""

    def matching(self, pattern: str) -> list[int]:
        """The tokens of the vocabulary that a regular expression is found in, as they are stored: a whole word or the
        end of one has ``</w>`` behind it. ValueError for what is no regular expression."""
        try:
            found = re.compile(pattern).search
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is no regular expression ({error}): write words, or correct it, as in ^dog</w>."
            ) from error
        return [number for piece, number in _read_vocabulary()[0].items() if found(piece)]

    def with_tokens(self, tokens: Iterable[str]) -> ClipTokenizer:
        """A tokenizer that also knows `tokens`, whose ids follow those of this one."""
        return ClipTokenizer((*self.added_tokens, *tokens))


def is_new_token(token: str) -> bool:
    """Whether a learned token is a new one, `[name]` or `<name>`, and not a word of the vocabulary.

    Raises ValueError for one that is neither: a new one holds letters, digits, `_`, `-` and `.`, since prompts give
    other characters a meaning, and file names too.
    """
    if re.fullmatch(r"\[[\w.-]+]|<[\w.-]+>", token):
        return True
    if not re.fullmatch(r"[\w.-]+", token):
        raise ValueError(
            f"The learned token {token!r} is neither [name] or <name> nor a word, of letters, digits, _, - and "
            "points; rename it."
        )
    return False


def token_id(token: str, tokenizer: ClipTokenizer) -> int:
    """The one id of a learned token.

    Raises ValueError where it is a word that the vocabulary holds in pieces, or a new one that `tokenizer` lacks.
    """
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise ValueError(
            f"The word {token!r} is {len(ids)} tokens of the text encoder's vocabulary, and one can be learned: "
            f"take another word, or a new token [name] that starts as {token!r}."
        )
    return ids[0]


@lru_cache(maxsize=1)
def default_tokenizer() -> ClipTokenizer:
    """The one shared tokenizer without added tokens."""
    return ClipTokenizer()


def pad_tokens(ids: Sequence[int], length: int = SEQUENCE_LENGTH) -> tuple[list[int], list[int]]:
    """Start, `ids`, end, and the end token again up to `length`; with the attention mask (1 up to the first end).

    Raises ValueError for more than `length` - 2 ids.
    """
    padding = length - 2 - len(ids)
    if padding < 0:
        raise ValueError(f"{len(ids)} tokens do not fit into a sequence of {length}; pass at most {length - 2}.")
    return [START_TOKEN, *ids, END_TOKEN] + [END_TOKEN] * padding, [1] * (len(ids) + 2) + [0] * padding


@lru_cache(maxsize=1)
def _read_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    lines = gzip.decompress(_DATA_FILE.read_bytes()).decode().splitlines()
    merges = [(first, second) for first, second in (line.split(" ") for line in lines)]
    # Bytes are written as printable characters: those that are printable in Latin-1 as themselves and first,
    # the others as U+0100 and up.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]
    tokens = characters + [character + "</w>" for character in characters]
    tokens += [first + second for first, second in merges]
    tokens += _SPECIAL_TOKENS
    return {token: index for index, token in enumerate(tokens)}, merges


def _build_backend(added_tokens: Sequence[str]):
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary, merges = _read_vocabulary()
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=_SPECIAL_TOKENS[1])
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=True) for token in _SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=True) for token in added_tokens])
    return backend
