"""Which part of the chain a weight belongs to, and how attention's fused weight divides.

Attention keeps query, key and value in one `in_proj_weight` of three thirds. A LoRA reaches it as a whole under that
published name, or by thirds under `to_q.weight`, `to_k.weight` and `to_v.weight` beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

FUSED = "in_proj_weight"
THIRDS = ("to_q.weight", "to_k.weight", "to_v.weight")
_TEXT = ("text_model.", "text_projection.")


def stage_of(name: str) -> str:
    """``text_encoder`` or ``stage_c``: where a weight of this name lies."""
    return "text_encoder" if name.startswith(_TEXT) else "stage_c"


def thirds_of(fused: str) -> tuple[str, str, str]:
    """The names of the thirds of a fused weight: query, key, value."""
    stem = fused.removesuffix(FUSED)
    return stem + THIRDS[0], stem + THIRDS[1], stem + THIRDS[2]


def located(name: str) -> tuple[str, int | None]:
    """The tensor of the model that `name` means, and which third of it; None for all of it."""
    for third, tail in enumerate(THIRDS):
        if name.endswith(".attn." + tail):
            return name.removesuffix(tail) + FUSED, third
    return name, None


def layer_of(name: str) -> str:
    """The layer that holds a weight: the name without its last word."""
    return name.rpartition(".")[0]


def matches(name: str, modules: Iterable[str]) -> bool:
    """Whether a weight's layer has one of `modules` in its name; an empty string is in every name."""
    return any(part in layer_of(name) for part in modules)
