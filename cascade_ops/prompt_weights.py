r"""Prompt weights as ComfyUI means them: `(word)` is 1.1, `(word:1.3)` is 1.3, `\(` and `\)` are plain parentheses.

A pair of parentheses multiplies the weight around it by 1.1; a pair with a number sets the weight of its content to
that number, whatever is around it: `((a))` is 1.21, `((a):1.3)` is 1.43, `((a:1.2):1.3)` is 1.2. Square brackets mean
nothing: learned tokens are written with them. An opening parenthesis that is never closed is plain text up to the end,
and a closing one that was never opened makes the next opening one plain text too.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import NamedTuple

STEP = 1.1

_SYMBOL = re.compile(r"\\[()]|.", re.DOTALL)


class WeightedText(NamedTuple):
    """A piece of a prompt, without the parentheses and escapes, and its weight."""

    text: str
    weight: float


def parse_prompt(prompt: str) -> list[WeightedText]:
    """Split `prompt` into pieces of one weight each, in order. Text that only looks like a weight stays text."""
    pieces = []
    # A work list and not recursion: how deep parentheses nest is the user's choice.
    pending = [(part, 1.0) for part in reversed(_split(_SYMBOL.findall(prompt)))]
    while pending:
        symbols, weight = pending.pop()
        if len(symbols) >= 2 and symbols[0] == "(" and symbols[-1] == ")":
            content, weight = _open_group(symbols[1:-1], weight)
            pending += [(part, weight) for part in reversed(_split(content))]
        else:
            text = "".join(symbol[-1] if symbol in (r"\(", r"\)") else symbol for symbol in symbols)
            pieces.append(WeightedText(text, weight))
    return pieces


def _split(symbols: list[str]) -> list[list[str]]:
    """The outermost groups, parentheses included, and what stands between them."""
    cuts, depth = [0], 0
    for place, symbol in enumerate(symbols):
        if symbol == "(":
            if depth == 0:
                cuts.append(place)
            depth += 1
        elif symbol == ")":
            depth -= 1
            if depth == 0:
                cuts.append(place + 1)
    return [symbols[start:end] for start, end in pairwise([*cuts, len(symbols)]) if start < end]


def _open_group(symbols: list[str], weight: float) -> tuple[list[str], float]:
    """The content of a group and its weight, from what stands between its parentheses."""
    if ":" in symbols[1:]:
        colon = len(symbols) - 1 - symbols[::-1].index(":")
        try:
            number = float("".join(symbols[colon + 1 :]))
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return symbols[:colon], number
    return symbols, weight * STEP
