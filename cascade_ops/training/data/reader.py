"""Reads the samples of a step; runs in the training process or in worker processes, with the same result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..objective import Batch
from .buckets import Bucket
from .cache import Store, key_of
from .entries import Entry, Problem
from .pictures import PictureError, as_image, as_tensor, crop_to, read_maps, read_picture
from .plan import Choice, Plan


@dataclass
class Pool:
    """The pictures of a run by bucket.

    buckets: shapes that have pictures. members: for each bucket, its entries. memory: pictures ``[H, W, 3]``, 0..1, by
    name, of entries that are not on disk.
    """

    buckets: list[Bucket]
    members: list[list[Entry]]
    memory: dict[str, Tensor]

    def open(self, entry: Entry):
        """The picture of an entry as an RGB image; PictureError where it cannot be read."""
        if entry.place is None:
            return as_image(self.memory[entry.name])
        with entry.place.open() as file:
            return read_picture(file)


@dataclass
class PriorLatents:
    """What the base model makes of a class. keys: for each bucket, of its latents in `store`."""

    store: Store
    keys: list[list[str]]
    caption: str
    loss_weight: float


@dataclass
class Wanted:
    """What a batch holds.

    stores: encoded pictures by kind. texts: encoded captions. image: whether pictures are read, because the objective
    wants them or because they are encoded in each step. random_crop: else the middle is kept.
    """

    stores: dict[str, Store]
    texts: Store | None
    image: bool
    maps: bool
    attributes: bool
    random_crop: bool


class StepReader(Dataset):
    """The samples of a step at this process's positions, as a batch.

    A picture that cannot be read gives its place to the next one of its bucket. Which one that is depends on nothing
    but the data. unreadable: names that are known to be damaged already.
    """

    def __init__(
        self,
        pool: Pool,
        plan: Plan,
        wanted: Wanted,
        prior: PriorLatents | None,
        unreadable: frozenset[str],
        batch: int,
        positions: Sequence[int],
    ):
        self.pool, self.plan, self.wanted, self.prior = pool, plan, wanted, prior
        self.unreadable, self.batch, self.positions = set(unreadable), batch, list(positions)
        self._read: set[str] = set()

    def __getitem__(self, step: int) -> tuple[Batch, list[Problem]]:
        bucket, choices = self.plan.choose(step, self.batch, self.positions)
        problems: list[Problem] = []
        for offset in range(len(self.pool.buckets)):
            # Where a whole bucket is lost, the next one stands in, in every process that reads this step.
            instead = (bucket + offset) % len(self.pool.buckets)
            samples = [self._sample(instead, choice, problems) for choice in choices]
            whole = [sample for sample in samples if sample is not None]
            if len(whole) == len(choices):
                return _stacked(whole), problems
        raise ValueError(
            f"None of the pictures can be read any more (such as {self.pool.members[0][0].name}), expected at least "
            "one: check the disk and run 'cascade dataset check'."
        )

    def _sample(self, bucket: int, choice: Choice, problems: list[Problem]) -> dict[str, Any] | None:
        """One sample of a bucket; None where none of its pictures can be read."""
        members = self.pool.members[bucket]
        if choice.prior and self.prior is not None:
            return self._prior(bucket, choice, self.prior) if self._readable(bucket, problems) else None
        for offset in range(len(members)):
            entry = members[(choice.index + offset) % len(members)]
            if entry.name in self.unreadable:
                continue
            try:
                return self._entry(entry, self.pool.buckets[bucket], choice)
            except PictureError as error:
                problems.append(Problem(entry.name, str(error)))
                self.unreadable.add(entry.name)
        return None

    def _readable(self, bucket: int, problems: list[Problem]) -> bool:
        """Whether any picture of the bucket can be read: a process whose samples are all prior latents must come to the
        same bucket as the others."""
        for entry in self.pool.members[bucket]:
            if entry.name in self._read:
                return True
            if entry.name in self.unreadable:
                continue
            try:
                if self.wanted.image:
                    self.pool.open(entry)
            except PictureError as error:
                problems.append(Problem(entry.name, str(error)))
                self.unreadable.add(entry.name)
            else:
                self._read.add(entry.name)
                return True
        return False

    def _entry(self, entry: Entry, bucket: Bucket, choice: Choice) -> dict[str, Any]:
        which = min(int(choice.caption * len(entry.captions)), len(entry.captions) - 1)
        caption = entry.captions[which]
        sample: dict[str, Any] = {"name": entry.name, "caption": caption, "loss_weight": entry.loss_weight}
        for kind, store in self.wanted.stores.items():
            sample |= {kind: store.read(picture_key(entry, bucket))["value"]}
        sample |= self._text(caption)
        if self.wanted.image or self.wanted.maps:
            across, down = (choice.across, choice.down) if self.wanted.random_crop else (0.5, 0.5)
            image, crop = crop_to(self.pool.open(entry), bucket.width, bucket.height, across, down)
            if self.wanted.image:
                sample["image"] = as_tensor(image)
            if self.wanted.maps and entry.maps is not None:
                with entry.maps.open() as file:
                    sample["maps"] = read_maps(file, crop)
        if self.wanted.attributes:
            sample["attributes"] = entry.attributes[which if len(entry.attributes) > 1 else 0]
        return sample

    def _prior(self, bucket: int, choice: Choice, prior: PriorLatents) -> dict[str, Any]:
        index = choice.index % len(prior.keys[bucket])
        row = prior.store.read(prior.keys[bucket][index])
        name = f"prior {index} of {self.pool.buckets[bucket].shape}"
        sample = {"name": name, "caption": prior.caption, "loss_weight": prior.loss_weight}
        return {**sample, "stage_c_latent": row["value"], **self._text(prior.caption)}

    def _text(self, caption: str) -> dict[str, Tensor]:
        return self.wanted.texts.read(caption_key(caption)) if self.wanted.texts is not None else {}


class PictureReader(Dataset):
    """Pictures of one bucket after the other, for encoding: ``(entry's place, [3, H, W] or None, why)``."""

    def __init__(self, pool: Pool, places: Sequence[tuple[int, int]]):
        self.pool, self.places = pool, list(places)

    def __getitem__(self, index: int) -> tuple[tuple[int, int], Tensor | None, str]:
        bucket, member = self.places[index]
        shape = self.pool.buckets[bucket]
        try:
            image = self.pool.open(self.pool.members[bucket][member])
        except PictureError as error:
            return (bucket, member), None, str(error)
        return (bucket, member), as_tensor(crop_to(image, shape.width, shape.height)[0]), ""


def load_in_order(dataset: Dataset, indices: Sequence[int], workers: int) -> Iterator[Any]:
    """The dataset's answers in the order of `indices`, read ahead by `workers` processes; 0 reads here.

    Workers are started afresh (spawn) on every system, so that what works on one works on Windows too.
    """
    if workers == 0 or len(indices) == 0:
        yield from (dataset[index] for index in indices)
        return
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,  # type: ignore[arg-type]
        num_workers=min(workers, len(indices)),
        collate_fn=_unchanged,
        multiprocessing_context="spawn",
    )
    yield from loader


def picture_key(entry: Entry, bucket: Bucket) -> str:
    """Of an encoded picture, cut in the middle to its bucket's shape."""
    return key_of("picture", entry.stamp, bucket.width, bucket.height, "centre")


def caption_key(caption: str) -> str:
    """Of an encoded caption."""
    return key_of("caption", caption)


def _unchanged(item: Any) -> Any:
    return item


def _stacked(samples: list[dict[str, Any]]) -> Batch:
    """Tensors gain a batch dimension; names and captions become lists, attributes a table of class indices.

    What prior latents lack stays a list with None in their places.
    """
    batch: Batch = {}
    for name in dict.fromkeys(key for sample in samples for key in sample):
        values = [sample.get(name) for sample in samples]
        if name == "loss_weight":
            batch[name] = torch.tensor(values, dtype=torch.float32)
        elif name == "attributes":
            batch[name] = {key: torch.tensor([value[key] for value in values]) for key in values[0]}
        elif all(isinstance(value, Tensor) for value in values):
            batch[name] = torch.stack(values)
        else:
            batch[name] = values
    return batch
