"""How many CPU threads a model is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .handles import StageHandle

# A layer of a smaller model is done before its threads have found each other; where other programs want the cores
# too, threads that wait for one another make it a hundred times slower.
_ONE_THREAD_PARAMETERS = 20_000_000


@contextmanager
def threads_for(handle: StageHandle) -> Iterator[None]:
    """Run a block with one thread if the stage is small and on the CPU; the number from before comes back after it."""
    before = torch.get_num_threads()
    alone = handle.device.type == "cpu" and handle.info.parameters < _ONE_THREAD_PARAMETERS
    if alone:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(before)
