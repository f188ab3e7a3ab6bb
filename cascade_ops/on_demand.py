"""A stage whose weights are read when something first asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .handles import StageHandle


class StageOnDemand(StageHandle):
    """A handle that loads nothing until it is used, and then once.

    stage: what it is. load: gives the loaded stage; a ValueError that it raises comes where the stage is used.
    """

    def __init__(self, stage: str, load: Callable[[], StageHandle] | None = None, **rest: Any):
        if load is None:
            # `dataclasses.replace` makes one of what is loaded by then.
            super().__init__(stage, **rest)
            return
        object.__setattr__(self, "stage", stage)
        object.__setattr__(self, "_load", load)

    def __getattr__(self, name: str) -> Any:
        # Called for what is not set yet. Everything else is missing for good: copying and pickling ask such questions.
        if name not in _FIELDS or "_load" not in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
        loaded = self._load()
        for field in _FIELDS:
            object.__setattr__(self, field, getattr(loaded, field))
        object.__delattr__(self, "_load")
        return getattr(self, name)


_FIELDS = tuple(field.name for field in fields(StageHandle))
