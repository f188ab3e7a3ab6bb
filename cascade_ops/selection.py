"""Pictures taken out of a batch by their numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .denoisers import TextCondition
from .wires import Latent

_ENTRY = re.compile(r"(\d+)(?:-(\d+))?")


def read_indexes(text: str, count: int) -> list[int]:
    """The numbers that ``"0, 3, 5-7"`` names, of `count` pictures counted from 0, in the order of the text.

    Commas, semicolons, spaces and line ends separate; both ends of a range belong to it.

    Raises:
        ValueError: a number that is not there or comes twice, a range that runs backwards, something else, or nothing.
    """
    there = f"the latent holds {count} pictures, 0 to {count - 1}" if count > 1 else "the latent holds 1 picture, 0"
    found: list[int] = []
    for entry in re.sub(r"\s*-\s*", "-", text.strip()).replace(",", " ").replace(";", " ").split():
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(
                f"indexes holds {entry!r}, expected numbers and ranges such as 0, 3, 5-7: {there}; write which to take."
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ValueError(f"indexes holds the range {entry}, which runs backwards: write {last}-{first}.")
        if last >= count:
            raise ValueError(f"indexes asks for picture {last} and {there}: numbers count from 0.")
        found += range(first, last + 1)
    if not found:
        raise ValueError(f"indexes names no picture and {there}: write which to take, such as 0, 3, 5-7.")
    twice = [number for place, number in enumerate(found) if number in found[:place]]
    if twice:
        raise ValueError(
            f"indexes names picture {twice[0]} twice, and it would be made twice alike: write each number once."
        )
    return found


def select(latent: Latent, indexes: Sequence[int]) -> Latent:
    """The pictures of a batch at `indexes`, in that order, with all that belongs to them.

    Each keeps its number in the batch of its seed (`Latent.batch_index`), so that the noise that it gets later is what
    it would be without the selection. A mask for all pictures stays as it is.

    Raises:
        ValueError: the latent has another number of pictures than its batch_index has numbers.
    """
    batch, mask, numbers = len(latent.samples), latent.mask, latent.numbers()
    return replace(
        latent,
        samples=latent.samples[list(indexes)],
        mask=mask if mask is None or mask.ndim == 2 else _of_each(mask, indexes, batch),
        batch_index=tuple(numbers[index] for index in indexes),
    )


def select_text(text: TextCondition, indexes: Sequence[int], batch: int) -> TextCondition:
    """The conditions of the pictures at `indexes`; one for the whole batch stays as it is."""
    return TextCondition(*(_of_each(values, indexes, batch) for values in text))


def _of_each(values: Tensor, indexes: Sequence[int], batch: int) -> Tensor:
    """Rows of a tensor that has one for each picture of a batch."""
    return values[list(indexes)] if len(values) == batch else values
