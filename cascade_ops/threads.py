"""How many CPU threads a model is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .handles import StageHandle

# A layer of a smaller model is done before its threads have found each other; where other programs want the cores
# too, threads that wait for one another make it a hundred times slower.
_ONE_THREAD_PARAMETERS = 20_000_000
# So many positions make up for it: at least these products of a weight and a position in a pass.
_WORTH_SHARING = 200_000_000


@contextmanager
def threads_for(handle: StageHandle, positions: int = 1) -> Iterator[None]:
    """Run a block with one thread if the stage is small and on the CPU; the number from before comes back after it.

    positions: of a pass, in all pictures and halves of guidance; many of them are worth more threads.
    """
    before, parameters = torch.get_num_threads(), handle.info.parameters
    small = parameters < _ONE_THREAD_PARAMETERS and parameters * positions < _WORTH_SHARING
    alone = handle.device.type == "cpu" and small
    if alone:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(before)
