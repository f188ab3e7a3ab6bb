"""The pictures of all sources of a run, as one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..settings import SOURCE_KINDS, Source
from .entries import Entry, Problem
from .folder import read_folder
from .huggingface import read_dataset
from .webdataset import read_tars

_READERS = {"folder": read_folder, "webdataset": read_tars, "huggingface": read_dataset}


@dataclass(frozen=True)
class SourceSummary:
    """What one source holds. left_out: pictures that its metadata does not list."""

    path: str
    kind: str
    pictures: int
    left_out: int


@dataclass(frozen=True)
class Pictures:
    """All pictures that can be opened, and what was found on the way."""

    entries: list[Entry]
    problems: list[Problem]
    sources: tuple[SourceSummary, ...] = ()


def read_sources(sources: Sequence[Source]) -> Pictures:
    """The pictures of all sources in order; those that cannot be opened are problems.

    Raises:
        ValueError: no source, a source that is not there or not of its kind, or no picture at all.
    """
    if not sources:
        raise ValueError("There is no data, expected at least one source: give data.sources a path to pictures.")
    everything, problems, summaries = [], [], []
    for label, source in zip(_labels(sources), sources, strict=True):
        if source.kind not in SOURCE_KINDS:
            raise ValueError(
                f"The source {source.path} is of the kind {source.kind!r}, expected one of {', '.join(SOURCE_KINDS)}."
            )
        if source.repeats < 1:
            raise ValueError(f"The source {source.path} has repeats {source.repeats}, expected 1 or more: correct it.")
        found = _READERS[source.kind](Path(source.path).expanduser(), label)
        changes = {"repeats": source.repeats, "loss_weight": source.loss_weight}
        if source.caption:
            changes["captions"] = (source.caption,)
        if source.caption and any(len(entry.attributes) > 1 for entry in found.entries):
            raise ValueError(
                f"The source {source.path} has attributes for each of its captions and is given the one caption "
                f"{source.caption!r}: leave the caption out."
            )
        everything += [replace(entry, **changes) for entry in found.entries]
        problems += found.problems
        summaries.append(SourceSummary(source.path, source.kind, len(found.entries), found.left_out))
    if not everything:
        what = f"; the first of {len(problems)} problems: {problems[0].name}: {problems[0].why}" if problems else ""
        paths = ", ".join(source.path for source in sources)
        raise ValueError(f"No picture was found in {paths}, expected at least one{what}: check the path and the kind.")
    return Pictures(everything, problems, tuple(summaries))


def _labels(sources: Sequence[Source]) -> list[str]:
    """Short names of the sources, each once."""
    labels: list[str] = []
    for source in sources:
        label = Path(source.path).expanduser().resolve().name or "data"
        labels.append(label if label not in labels else f"{label}-{len(labels) + 1}")
    return labels
