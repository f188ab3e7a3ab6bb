"""What a data set would be trained on, and what is wrong with it: the answer of ``cascade dataset check``."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from ...tokenizer import SEQUENCE_LENGTH, default_tokenizer
from .buckets import Bucket
from .entries import Entry, Problem
from .pictures import PictureError
from .reader import Pool
from .sources import SourceSummary

_EXAMPLES = 5


class BucketCount(NamedTuple):
    """How many pictures a shape has, and how many samples of a pass over the data."""

    bucket: Bucket
    pictures: int
    samples: int


class LongCaption(NamedTuple):
    """A caption of which only the first 75 tokens are read."""

    name: str
    tokens: int


class Enlarged(NamedTuple):
    """A picture that is smaller than its bucket and would be blown up."""

    name: str
    width: int
    height: int
    factor: float


@dataclass(frozen=True)
class DatasetReport:
    """pictures: that can be trained on. samples: of a pass, with repeats. steps: batches of a pass. problems: pictures
    that are skipped. without_caption: names; these see the empty prompt. duplicates: groups of equal files. examples:
    of names and captions."""

    sources: tuple[SourceSummary, ...]
    pictures: int
    samples: int
    steps: int
    batch_size: int
    buckets: tuple[BucketCount, ...]
    problems: tuple[Problem, ...]
    captions: int
    without_caption: tuple[str, ...]
    long_captions: tuple[LongCaption, ...]
    duplicates: tuple[tuple[str, ...], ...]
    enlarged: tuple[Enlarged, ...]
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for source in self.sources:
            left = f", {source.left_out} not listed in its metadata are left out" if source.left_out else ""
            yield f"{source.path} ({source.kind}): {source.pictures} pictures{left}"
        yield ""
        yield (
            f"{self.pictures} pictures with {self.captions} different captions, {self.samples} samples in a pass of "
            f"{self.steps} batches of {self.batch_size}"
        )
        yield ""
        yield "  size         latent   pictures   samples"
        for bucket, pictures, samples in self.buckets:
            latent = f"{bucket.latent_width}x{bucket.latent_height}"
            few = f"   fewer than a batch of {self.batch_size}: repeated" if samples < self.batch_size else ""
            yield f"  {bucket.shape:<12} {latent:<8} {pictures:>8} {samples:>9}{few}"
        yield from _listed("skipped", [f"{name}: {why}" for name, why in self.problems])
        yield from _listed("without a caption, trained with the empty prompt", self.without_caption)
        yield from _listed(
            f"with a caption that is cut to {SEQUENCE_LENGTH - 2} tokens",
            [f"{name}: {tokens} tokens" for name, tokens in self.long_captions],
        )
        yield from _listed(
            "smaller than they are trained, enlarged",
            [f"{name}: {width}x{height}, {factor:.2f} times" for name, width, height, factor in self.enlarged],
        )
        yield from _listed("found more than once", [" = ".join(group) for group in self.duplicates])
        yield ""
        for name, caption in self.examples:
            yield f"  {name}: {caption or '(no caption)'}"


def check_pictures(
    pool: Pool,
    samples: Sequence[int],
    problems: Iterable[Problem],
    sources: tuple[SourceSummary, ...],
    batch_size: int,
    threads: int = 4,
) -> DatasetReport:
    """Read every picture from its first byte to its last, and say what was found.

    samples: of a pass, by bucket. problems: known so far.
    """
    entries = [entry for members in pool.members for entry in members]
    problems = dict.fromkeys(problems)
    with ThreadPoolExecutor(threads) as executor:
        for problem in executor.map(lambda entry: _problem(pool, entry), entries):
            if problem is not None:
                problems[problem] = None
    broken = {problem.name for problem in problems}
    sound = [entry for entry in entries if entry.name not in broken]
    counts = [
        BucketCount(bucket, sum(entry.name not in broken for entry in members), count)
        for bucket, members, count in zip(pool.buckets, pool.members, samples, strict=True)
    ]
    return DatasetReport(
        sources=sources,
        pictures=len(sound),
        samples=sum(samples),
        steps=sum(-(-count // batch_size) for count in samples),
        batch_size=batch_size,
        buckets=tuple(counts),
        problems=tuple(problems),
        captions=len({caption for entry in sound for caption in entry.captions if caption}),
        without_caption=tuple(entry.name for entry in sound if not all(entry.captions)),
        long_captions=tuple(_long_captions(sound)),
        duplicates=tuple(_duplicates(entry for entry in sound if entry.place is not None)),
        enlarged=tuple(_enlarged(pool, broken)),
        examples=tuple((entry.name, entry.captions[0]) for entry in sound[:_EXAMPLES]),
    )


def _problem(pool: Pool, entry: Entry) -> Problem | None:
    try:
        pool.open(entry)
    except PictureError as error:
        return Problem(entry.name, str(error))
    return None


def _long_captions(entries: Iterable[Entry]) -> Iterator[LongCaption]:
    tokenizer = default_tokenizer()
    for entry in entries:
        tokens = max(len(tokenizer.encode(caption)) for caption in entry.captions)
        if tokens > SEQUENCE_LENGTH - 2:
            yield LongCaption(entry.name, tokens)


def _enlarged(pool: Pool, broken: set[str]) -> Iterator[Enlarged]:
    for bucket, members in zip(pool.buckets, pool.members, strict=True):
        for entry in members:
            factor = max(bucket.width / entry.width, bucket.height / entry.height)
            if factor > 1 and entry.name not in broken:
                yield Enlarged(entry.name, entry.width, entry.height, factor)


def _duplicates(entries: Iterable[Entry]) -> Iterator[tuple[str, ...]]:
    """Groups of files of the same content; only those of equal size are read."""
    by_size: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_size[entry.place.size()].append(entry)
    for group in by_size.values():
        by_content: dict[bytes, list[str]] = defaultdict(list)
        for entry in group if len(group) > 1 else ():
            by_content[_digest(entry)].append(entry.name)
        yield from (tuple(names) for names in by_content.values() if len(names) > 1)


def _digest(entry: Entry) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with entry.place.open() as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    if not lines:
        return
    yield ""
    yield f"{len(lines)} {title}:"
    yield from (f"  {line}" for line in lines[:_EXAMPLES])
    if len(lines) > _EXAMPLES:
        yield f"  and {len(lines) - _EXAMPLES} more"
