"""Pictures that Stage B has finished, kept so that the next run samples only what is new.

With noise of its own and rescaled by itself, a picture depends on its own seed and its own inputs and not on the rest
of its batch. When another choice of a batch is finished, the pictures that were chosen before are taken from then.
They are the same pictures if all that goes into them is: the loaded model, the settings, the seed and the number in
its batch, the Stage C latent, the texts, the latent to start from, masks and size. A field that is added to `Latent`
or `SamplingSettings` counts too.

On a CPU or GPU the rest of a batch can change the order of sums, so that a kept picture and the one that a whole new
run would make may differ by rounding.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .denoisers import TextCondition
from .handles import StageHandle
from .selection import select, select_text
from .stages import Callback, SamplingSettings, sample_stage_b
from .wires import Latent

# Bytes of latents that are kept at most: 256 pictures of 1024 x 1024.
LIMIT = 256 * 2**20


@dataclass(frozen=True)
class StageBRun:
    """What goes into a run of `stages.sample_stage_b`, beside the model."""

    latent: Latent
    positive: TextCondition
    negative: TextCondition | None
    seed: int
    settings: SamplingSettings
    start_latent: Latent | None = None

    def of(self, indexes: Sequence[int]) -> StageBRun:
        """The same for some pictures of the batch."""
        batch, start = len(self.latent.samples), self.start_latent
        if start is not None:
            chosen = select(start, indexes) if len(start.samples) == batch else start
            # Noise comes from the numbers of the Stage C latent.
            start = replace(chosen, batch_index=None)
        return replace(
            self,
            latent=select(self.latent, indexes),
            positive=select_text(self.positive, indexes, batch),
            negative=None if self.negative is None else select_text(self.negative, indexes, batch),
            start_latent=start,
        )

    def sample(
        self,
        handle: StageHandle,
        callback: Callback | None = None,
        before_window: Callable[[], None] | None = None,
    ) -> Latent:
        """Sample the whole batch."""
        return sample_stage_b(
            handle,
            self.latent,
            self.positive,
            self.negative,
            seed=self.seed,
            settings=self.settings,
            start_latent=self.start_latent,
            callback=callback,
            before_window=before_window,
        )


class FinishedPictures:
    """Latents of the last runs with one model, up to `limit` bytes; those used longest ago are forgotten first."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._kept: OrderedDict[bytes, Latent] = OrderedDict()
        self._handle: Callable[[], StageHandle | None] = lambda: None

    def plan(self, handle: StageHandle, run: StageBRun) -> Plan:
        """What of a run is there. handle: the loaded model; another one than in the run before forgets everything."""
        if self._handle() is not handle:
            self._kept.clear()
            # Weak, so that the model can be freed.
            self._handle = weakref.ref(handle)
        keys = _keys(run)
        kept = {index: self._kept[key] for index, key in enumerate(keys) if key in self._kept}
        return Plan(self, run, tuple(keys), kept)

    def keep(self, keys: Sequence[bytes], made: Latent) -> None:
        """Keep the pictures of a batch, each under its key."""
        for index, key in enumerate(keys):
            if key not in self._kept:
                # Indexing copies: a view would hold the whole batch in memory.
                self._kept[key] = select(made, [index])
            self._kept.move_to_end(key)
        sizes = [each.samples.numel() * each.samples.element_size() for each in self._kept.values()]
        excess = sum(sizes) - self._limit
        for size in sizes:
            if excess <= 0:
                break
            self._kept.popitem(last=False)
            excess -= size


@dataclass(frozen=True)
class Plan:
    """A run of which some pictures are finished: `kept`, by their place in the batch."""

    owner: FinishedPictures
    run: StageBRun
    keys: tuple[bytes, ...]
    kept: dict[int, Latent]

    @property
    def missing(self) -> list[int]:
        """Places in the batch of the pictures to sample."""
        return [index for index in range(len(self.run.latent.samples)) if index not in self.kept]

    def sample(
        self,
        handle: StageHandle,
        callback: Callback | None = None,
        before_window: Callable[[], None] | None = None,
    ) -> Latent:
        """The latents of the whole batch; only what is missing is sampled, with `handle` where it was placed to run.

        All of them are kept for the next run. Where sampling fails or is interrupted, nothing new is.
        """
        missing = self.missing
        if not self.kept:
            made = self.run.sample(handle, callback, before_window)
        else:
            parts = dict(self.kept)
            if missing:
                new = self.run.of(missing).sample(handle, callback, before_window)
                parts |= {index: select(new, [place]) for place, index in enumerate(missing)}
            samples = torch.cat([parts[index].samples for index in sorted(parts)])
            made = replace(parts[0], samples=samples, batch_index=self.run.latent.batch_index)
        self.owner.keep(self.keys, made)
        return made


def _keys(run: StageBRun) -> list[bytes]:
    """One for each picture; none where they cannot be kept."""
    # Rescaled over the batch, a picture depends on all of them.
    if run.settings.rescale_over != "image":
        return []
    try:
        return [fingerprint(run.of([index])) for index in range(len(run.latent.samples))]
    except TypeError:  # some other node's value in a latent
        return []


def fingerprint(value: Any) -> bytes:
    """Stands for a value of numbers, texts, tensors and data classes of them: equal for those that are equal bitwise.

    Raises:
        TypeError: the value holds something else, of which nobody knows when it is the same.
    """
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    digest.update(f"{type(value).__name__}:".encode())
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif is_dataclass(value):
        for field in fields(value):
            digest.update(f"{field.name}=".encode())
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value).encode()
        digest.update(f"{len(text)}:".encode() + text)
    else:
        raise TypeError(f"A {type(value).__name__} cannot be compared with that of another run.")
