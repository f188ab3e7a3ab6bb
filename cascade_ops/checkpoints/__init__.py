"""Checkpoints: say what a file is, load it whatever layout it has, save it in the original one.

``inspect_file(path)`` reads the header alone; ``load(path, expect="stage_c")`` builds the model; ``save`` writes one.
Only safetensors are read. Every refusal is a ``CheckpointError`` (a ``ValueError``) of one sentence.
"""

from .errors import CheckpointError
from .info import FileInfo, inspect_file
from .loading import load
from .saving import save

__all__ = ["CheckpointError", "FileInfo", "inspect_file", "load", "save"]
