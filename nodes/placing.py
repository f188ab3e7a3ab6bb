"""Where a stage's weights are while a node runs.

Loaders leave the weights in main memory. A node that runs a model takes a copy of them on the device for the time of
its run, so that only one stage occupies the device at a time and nothing that came in on a wire is moved or changed.
On a CPU there is nothing to copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import runtime

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle


def on_device(handle: StageHandle) -> StageHandle:
    """The stage on the device that the host runs models on, with room made for it first."""
    device = runtime.device()
    if handle.device != device:
        runtime.free_memory(handle.size_in_bytes)
    return handle.to(device)
