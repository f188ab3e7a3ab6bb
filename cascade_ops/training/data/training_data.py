"""The data of a run: pictures by shape, what is encoded of them, and the batches of every step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..objective import Batch
from ..parts import Parts
from ..settings import Settings
from .buckets import make_buckets, nearest_bucket
from .dataset_report import DatasetReport, check_pictures
from .encoders import ENCODED_BY, OF_CAPTIONS, OF_PICTURES, Encoders
from .encoding import Cache, encode_missing
from .entries import Entry, Problem
from .plan import Plan
from .prior import check_prior, make_prior, prior_counts
from .reader import Pool, StepReader, Wanted, load_in_order
from .sources import Pictures, read_sources

_KNOWN = frozenset({"image", "caption", "name", "loss_weight", "maps", "attributes", *ENCODED_BY})


def _silent(line: str) -> None:
    """Nobody listens."""


class TrainingData:
    """Batches of a run, made by `open` or `from_pictures`.

    Pictures that turn out to be damaged are reported once and skipped: the next picture of the same shape takes their
    place, the same one in every process and after every restart.
    """

    def __init__(
        self,
        pictures: Pictures,
        memory: dict[str, Tensor],
        settings: Settings,
        needs: frozenset[str],
        parts: Parts | None,
        report: Callable[[str], None] = _silent,
        device: torch.device | str = "cpu",
    ):
        """memory: pictures ``[H, W, 3]``, 0..1, by name, of entries that are in no file; then encoded ones stay in
        memory too."""
        _check_needs(needs, pictures.entries)
        check_prior(settings, needs)
        self.settings, self.needs, self._report = settings, needs, report
        self._sources, self._problems = pictures.sources, dict.fromkeys(pictures.problems)
        for problem in pictures.problems:
            report(f"Skipped {problem.name}: {problem.why}.")
        self._pool = _sorted_into_buckets(pictures.entries, memory, settings)
        self._samples = [
            [place for place, entry in enumerate(members) for _ in range(entry.repeats)]
            for members in self._pool.members
        ]
        device = torch.device(device)
        self._encoders = Encoders(parts, device) if parts is not None else None
        encoded = needs & ENCODED_BY.keys()
        if encoded and parts is None:
            raise ValueError(f"{', '.join(sorted(encoded))} are encoded and no models were given: pass Parts.")
        self._live: frozenset[str] = frozenset()
        self._image_width = 0
        stores, texts, unreadable = {}, None, frozenset()
        if encoded:
            # A random crop shows another picture in each step.
            kept = set(encoded) if settings.data.cache else set()
            kept -= set(OF_PICTURES) if settings.data.crop == "random" else set()
            self._live = frozenset(encoded - kept)
            extra = [settings.prior.caption] if settings.prior.caption else []
            cache = Cache(None if memory else _cache_folder(settings), self._encoders, report, settings.data.workers)
            stores, texts, damaged = encode_missing(cache, self._pool, frozenset(kept), extra)
            self._note(damaged)
            unreadable = frozenset(problem.name for problem in damaged)
            if "image_embedding" in needs:
                self._image_width = self._encoders.handle("image_encoder").module.config.projection_dim
        self._unreadable = unreadable
        self._prior, share, counts = None, 0.0, []
        if settings.prior.caption and "stage_c_latent" in needs:
            share = settings.prior.share
            counts = prior_counts(settings.prior.pictures, [len(samples) for samples in self._samples])
            root = None if memory or not settings.data.cache else _cache_folder(settings)
            self._prior = make_prior(settings, parts, self._pool.buckets, counts, root, device, report)
        self._plan = Plan(settings.seed, self._samples, share, counts)
        self._wanted = Wanted(
            stores=stores,
            texts=texts,
            image="image" in needs or bool(self._live & set(OF_PICTURES)),
            maps="maps" in needs,
            attributes="attributes" in needs,
            random_crop=settings.data.crop == "random",
        )
        if self._encoders is not None and not self._live:
            self._encoders.release()

    @classmethod
    def open(
        cls,
        settings: Settings,
        needs: frozenset[str],
        parts: Parts | None,
        report: Callable[[str], None] = _silent,
        device: torch.device | str = "cpu",
    ) -> TrainingData:
        """The data that the settings name, with everything encoded and cached that can be.

        needs: what a batch must hold, see `Objective`; ``caption``, ``name`` and ``loss_weight`` are always there.
        parts: the encoders; None where nothing is encoded. report: gets lines for people. device: where is encoded.

        Raises:
            ValueError: settings or sources that cannot be used, or no picture at all.
        """
        return cls(read_sources(settings.data.sources), {}, settings, needs, parts, report, device)

    @classmethod
    def from_pictures(
        cls,
        images: Tensor | Sequence[Tensor],
        captions: Sequence[str],
        settings: Settings,
        needs: frozenset[str],
        parts: Parts | None,
        report: Callable[[str], None] = _silent,
        device: torch.device | str = "cpu",
    ) -> TrainingData:
        """Pictures ``[N, H, W, 3]``, or N of ``[H, W, 3]``, 0..1, with a caption each; nothing is written to disk.

        Raises:
            ValueError: no picture, another shape, or as many captions as pictures are not given.
        """
        pictures = list(images)
        if not pictures or any(picture.ndim != 3 or picture.shape[-1] != 3 for picture in pictures):
            shapes = [list(picture.shape) for picture in pictures[:3]]
            raise ValueError(f"Pictures of shapes {shapes} were given, expected one or more [H, W, 3]: connect images.")
        if len(captions) != len(pictures):
            raise ValueError(
                f"{len(captions)} captions were given for {len(pictures)} pictures, expected one each: write one line "
                "per picture."
            )
        memory, entries = {}, []
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True), start=1):
            name = f"picture {number}"
            memory[name] = picture = picture.detach().float().cpu().contiguous()
            stamp = hashlib.blake2b(picture.numpy().data, digest_size=16).hexdigest()
            height, width = picture.shape[:2]
            entries.append(Entry(name, None, stamp, width, height, (" ".join(caption.split()),)))
        return cls(Pictures(entries, []), memory, settings, needs, parts, report, device)

    def __len__(self) -> int:
        """Samples in a pass over the data, repeats included."""
        return len(self._plan)

    @property
    def problems(self) -> list[Problem]:
        """Pictures that were skipped so far, and why."""
        return list(self._problems)

    def check(self) -> DatasetReport:
        """Read every picture whole and say what would be trained on."""
        samples = [len(samples) for samples in self._samples]
        return check_pictures(self._pool, samples, self._problems, self._sources, self.settings.batch_size)

    def batches(self, first_step: int, last_step: int, global_batch: int, positions: Sequence[int]) -> Iterator[Batch]:
        """The batches of the steps from `first_step` to before `last_step`.

        global_batch: samples of a step, of all processes. positions: of this process's samples in it, 0 and up; only
        these are read. A batch depends on the settings, the step and the data alone. Tensors are in main memory.
        """
        unknown = [position for position in positions if not 0 <= position < global_batch]
        if unknown or not positions:
            raise ValueError(
                f"The positions {list(positions)} were asked for in a batch of {global_batch}, expected one or more "
                f"from 0 to {global_batch - 1}."
            )
        reader = StepReader(
            self._pool, self._plan, self._wanted, self._prior, self._unreadable, global_batch, positions
        )
        workers = 0 if self._pool.memory else self.settings.data.workers
        for batch, problems in load_in_order(reader, range(first_step, last_step), workers):
            self._note(problems)
            yield self._completed(batch)

    def _note(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            if problem not in self._problems:
                self._problems[problem] = None
                self._report(f"Skipped {problem.name}: {problem.why}.")

    def _completed(self, batch: Batch) -> Batch:
        """The batch with what is encoded in each step, and with empty picture embeddings for prior latents."""
        images = batch["image"] if "image" in self.needs else batch.pop("image", None)
        images = [None] * len(batch["name"]) if images is None else images
        for kind in sorted(self._live & set(OF_PICTURES)):
            values = list(batch.get(kind, [None] * len(images)))
            rows = [row for row, image in enumerate(images) if image is not None]
            if rows:
                encoded = self._encoders.pictures(kind, torch.stack([images[row] for row in rows]))
                for row, value in zip(rows, encoded, strict=True):
                    values[row] = value
            batch[kind] = values
        if self._live & set(OF_CAPTIONS):
            hidden, pooled = self._encoders.text(batch["caption"])
            batch |= {kind: value for kind, value in (("text", hidden), ("text_pooled", pooled)) if kind in self._live}
        if "image_embedding" in self.needs:
            nothing = torch.zeros(1, self._image_width)
            given = batch.get("image_embedding", [None] * len(batch["name"]))
            batch["image_embedding"] = [nothing if value is None else value for value in given]
        for kind in self.needs & set(OF_PICTURES):
            if isinstance(batch[kind], list):
                batch[kind] = torch.stack(batch[kind])
        return batch


def _cache_folder(settings: Settings) -> Path:
    own = settings.data.cache_folder
    return Path(own).expanduser() if own else Path(settings.output, "cache")


def _check_needs(needs: frozenset[str], entries: Sequence[Entry]) -> None:
    unknown = sorted(needs - _KNOWN)
    if unknown:
        raise ValueError(f"A batch was asked for {', '.join(unknown)}, expected some of {', '.join(sorted(_KNOWN))}.")
    if "maps" in needs:
        lacking = next((entry for entry in entries if entry.maps is None), None)
        if lacking is not None:
            raise ValueError(f"{lacking.name} has no class maps, expected 'maps' in its row of metadata.jsonl: add it.")
    if "attributes" in needs:
        names = {frozenset(row) for entry in entries for row in entry.attributes or ({},)}
        if len(names) != 1 or names == {frozenset()}:
            raise ValueError(
                f"The pictures have {len(names)} different sets of attributes, expected the same names for all of "
                "them: complete 'attributes' in metadata.jsonl."
            )


def _sorted_into_buckets(entries: Sequence[Entry], memory: dict[str, Tensor], settings: Settings) -> Pool:
    shapes = make_buckets(settings.data.resolution, settings.data.buckets)
    members: list[list[Entry]] = [[] for _ in shapes]
    for entry in entries:
        members[nearest_bucket(entry.width, entry.height, shapes)].append(entry)
    used = [number for number, those in enumerate(members) if those]
    return Pool([shapes[number] for number in used], [members[number] for number in used], memory)
