"""The kinds of training: one module per target, each with ``build(settings, parts) -> Objective``."""

from __future__ import annotations

from importlib import import_module

from ..objective import Objective
from ..parts import Parts
from ..settings import TARGETS, Settings


def build(settings: Settings, parts: Parts) -> Objective:
    """The objective of a run, with its models loaded.

    Raises:
        ValueError: no such target; a model file that is missing or does not fit; see the targets.
    """
    if settings.target not in TARGETS:
        raise ValueError(f"The target is {settings.target!r}, expected one of {', '.join(TARGETS)}.")
    return import_module(f".{settings.target}", __name__).build(settings, parts)
