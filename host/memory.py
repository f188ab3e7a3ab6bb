"""How much memory the machine has."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def machine_memory() -> tuple[int, int]:
    """Bytes of main memory, in all and available; 0 for what the system does not tell."""
    if sys.platform == "win32":
        return _windows_memory()
    total = _pages("SC_PHYS_PAGES")
    return total, _available() or _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int:
    try:
        return max(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"), 0)
    except (ValueError, OSError):
        return 0


def _available() -> int:
    """What Linux could hand out without swapping, caches included."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available")),
            *((f"unused_{index}", ctypes.c_ulonglong) for index in range(5)),
        ]

    status = MemoryStatus()
    status.length = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.total, status.available
