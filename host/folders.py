"""The folders that a host keeps its files in, and names that must stay inside them."""

from __future__ import annotations

import os
from pathlib import Path

from ..cascade_ops.model_folders import roots_from_environment


class DataFolders:
    """`models`, `input`, `output` and `temp` below one folder, made when something is written there."""

    def __init__(self, root: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root).absolute()
        self.input = self.root / "input"
        self.output = self.root / "output" if output is None else Path(output).absolute()
        self.temp = self.root / "temp"
        self.models = [self.root / "models", *roots_from_environment()]

    def directory(self, kind: str) -> Path:
        """The folder of `kind` "input", "output" or "temp"."""
        if kind not in ("input", "output", "temp"):
            raise ValueError(f"{kind!r} is not a data folder; expected input, output or temp")
        return getattr(self, kind)


def inside(directory: str | os.PathLike[str], name: str) -> Path:
    """The path of `name` below `directory`; ValueError where it leads out of it, by `..`, a root or a link."""
    base = os.path.realpath(directory)
    path = None if "\0" in name else os.path.realpath(os.path.join(base, name.replace("\\", "/")))
    if path is None or os.path.commonpath([base, path]) != base:
        raise ValueError(f"{name!r} leads out of the folder {os.fspath(directory)}; give a name inside it")
    return Path(path)


def split_annotation(name: str, default: str = "input") -> tuple[str, str]:
    """`"a.png [output]"` as its name and the kind of folder that it says, or `default`."""
    for kind in ("input", "output", "temp"):
        suffix = f" [{kind}]"
        if name.endswith(suffix):
            return name[: -len(suffix)], kind
    return name, default
