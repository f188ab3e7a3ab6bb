"""How much memory is free, and giving back what is held without use."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that new tensors on `device` could take; None where nobody says.

    On CUDA what the driver has free and what PyTorch holds in reserve; on the CPU what Linux could hand out without
    swapping, file caches included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _available() if device.type == "cpu" else None


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def release_unused() -> None:
    """Collect garbage and hand the memory that PyTorch holds in reserve back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gigabytes(count: float) -> str:
    """``5.1 GB``; a GB is 10^9 bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
