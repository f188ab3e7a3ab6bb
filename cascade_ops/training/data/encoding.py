"""Encodes what is not in the cache yet, pictures of one shape at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import DiskStore, MemoryStore, ShardWriter, Store, missing, store_folder
from .encoders import ENCODED_BY, OF_CAPTIONS, OF_PICTURES, Encoders
from .entries import Problem
from .reader import PictureReader, Pool, caption_key, load_in_order, picture_key

# Changes when pictures are prepared for the encoders in another way than before.
_PREPARATION = 2
_PICTURES, _CAPTIONS = 8, 32
_LINES = 20  # of progress in all


class Cache(NamedTuple):
    """Where results go and what makes them. root: None keeps them in memory."""

    root: Path | None
    encoders: Encoders
    report: Callable[[str], None]
    workers: int

    def store(self, kind: str, stage: str) -> Store:
        """The results of this kind so far, by the encoder as it is now."""
        if self.root is None:
            return MemoryStore()
        depends = {"encoder": self.encoders.fingerprint(stage), "preparation": _PREPARATION}
        return DiskStore(store_folder(self.root, kind, depends))


def encode_missing(
    cache: Cache, pool: Pool, kinds: frozenset[str], captions: Sequence[str] = ()
) -> tuple[dict[str, Store], Store | None, list[Problem]]:
    """Encode what the pictures and captions of the pool lack of `kinds`.

    captions: further ones beside the pictures'. Returns the stores of pictures by kind, the store of captions if one
    is among `kinds`, and the pictures that cannot be read.
    """
    of_pictures = {kind: cache.store(kind, ENCODED_BY[kind]) for kind in OF_PICTURES if kind in kinds}
    problems = _encode_pictures(cache, pool, of_pictures)
    wanted = [kind for kind in OF_CAPTIONS if kind in kinds]
    if not wanted:
        return of_pictures, None, problems
    texts = cache.store("+".join(wanted), "text_encoder")
    every = [caption for members in pool.members for entry in members for caption in entry.captions]
    _encode_captions(cache, texts, wanted, [*every, *captions])
    return of_pictures, texts, problems


def _encode_pictures(cache: Cache, pool: Pool, stores: dict[str, Store]) -> list[Problem]:
    places = [
        (bucket, member)
        for bucket, members in enumerate(pool.members)
        for member, entry in enumerate(members)
        if any(picture_key(entry, pool.buckets[bucket]) not in store for store in stores.values())
    ]
    if not places:
        return []
    cache.report(f"Encoding {len(places)} pictures.")
    problems: list[Problem] = []
    writers = {kind: ShardWriter(store) for kind, store in stores.items()}
    reader = PictureReader(pool, places)
    workers = 0 if pool.memory else cache.workers
    done, said = 0, 0
    for chunk in _of_one_bucket(load_in_order(reader, range(len(places)), workers)):
        keys, images = [], []
        for (bucket, member), image, why in chunk:
            entry = pool.members[bucket][member]
            if image is None:
                problems.append(Problem(entry.name, why))
            else:
                keys.append(picture_key(entry, pool.buckets[bucket]))
                images.append(image)
        if images:
            _encode_chunk(cache.encoders, stores, writers, keys, torch.stack(images))
        done += len(chunk)
        if done * _LINES // len(places) > said and done < len(places):
            said = done * _LINES // len(places)
            cache.report(f"Encoded {done} of {len(places)} pictures.")
    for writer in writers.values():
        writer.flush()
    return problems


def _encode_chunk(
    encoders: Encoders, stores: dict[str, Store], writers: dict[str, ShardWriter], keys: list[str], images: Tensor
) -> None:
    for kind, store in stores.items():
        lacking = [number for number, key in enumerate(keys) if key not in store]
        if lacking:
            for number, value in zip(lacking, encoders.pictures(kind, images[lacking]), strict=True):
                writers[kind].add(keys[number], {"value": value})


def _of_one_bucket(items: Iterator) -> Iterator[list]:
    for _, group in groupby(items, key=_bucket):
        chunk = []
        for item in group:
            chunk.append(item)
            if len(chunk) == _PICTURES:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _bucket(item: tuple) -> int:
    return item[0][0]


def _encode_captions(cache: Cache, store: Store, kinds: Sequence[str], captions: Sequence[str]) -> None:
    texts = {caption_key(caption): caption for caption in captions}
    lacking = missing(store, texts)
    if not lacking:
        return
    cache.report(f"Encoding {len(lacking)} captions.")
    writer = ShardWriter(store)
    for start in range(0, len(lacking), _CAPTIONS):
        keys = lacking[start : start + _CAPTIONS]
        hidden, pooled = cache.encoders.text([texts[key] for key in keys])
        for key, *values in zip(keys, hidden, pooled, strict=True):
            named = dict(zip(("text", "text_pooled"), values, strict=True))
            writer.add(key, {kind: named[kind] for kind in kinds})
    writer.flush()
