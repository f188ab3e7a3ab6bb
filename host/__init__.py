"""The embedded host: runs ComfyUI graphs where ComfyUI is not installed."""

from .engine import Host
from .progress import ProgressBar
from .signals import ExecutionBlocker, RunInterrupted

__all__ = ["ExecutionBlocker", "Host", "ProgressBar", "RunInterrupted"]
