"""The dialects that say in each tensor's name which weight it changes: ComfyUI's, OneTrainer's and diffusers'.

One reader takes them all, older forms of them too; what a file is called in matters only when it is written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..changes import WeightChange
from ..loha import LoHaWeights, product
from ..lokr import LoKrWeights
from ..lora import LoRAWeights
from ..tokens import LearnedToken, vectors_of
from .fusing import split
from .names import NAMING, read_name

_BUNDLED = "bundle_emb."


def read_weights(tensors: Mapping[str, Tensor]) -> tuple[dict[str, WeightChange], tuple[str, ...]]:
    """The changes of a file, and the names of tensors that were not understood."""
    pieces: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unread = []
    for key, tensor in tensors.items():
        piece = read_name(key)
        if piece is None:
            unread.append(key)
            continue
        if piece.leaf in pieces.setdefault(piece.weight, {}):
            raise ValueError(
                f"The LoRA holds two tensors for '{piece.weight}', '{key}' and another under an older name: "
                "the file is damaged or joined from two, save it again."
            )
        pieces[piece.weight][piece.leaf] = tensor
        keys.setdefault(piece.weight, []).append(key)
    weights = {}
    for weight, found in pieces.items():
        change = _change(found)
        if change is None:
            unread += keys[weight]
        else:
            weights[weight] = change
    return weights, tuple(unread)


def _change(found: Mapping[str, Tensor]) -> WeightChange | None:
    """What the tensors of one weight make together; None where they make nothing whole."""
    # Without alpha a change counts as it is.
    alpha = float(found["alpha"]) if "alpha" in found else None
    if "down" in found and "up" in found:
        return _lora(found, alpha)
    scale = found.get("dora_scale")
    if all(f"hada_{part}" in found for part in ("w1_a", "w1_b", "w2_a", "w2_b")):
        w1_a, w1_b, w2_a, w2_b = (found[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        rank = float(len(w1_b))
        t1, t2 = found.get("hada_t1"), found.get("hada_t2")
        return LoHaWeights(w1_a, w1_b, w2_a, w2_b, rank if alpha is None else alpha, t1, t2, scale)
    (w1, rank1), (w2, rank2) = _kronecker_factor(found, "w1"), _kronecker_factor(found, "w2")
    if w1 is None or w2 is None:
        return None
    rank = rank2 or rank1
    # Two whole factors have no rank, and then alpha means nothing.
    return LoKrWeights(w1, w2, alpha / rank if rank and alpha is not None else 1.0, scale)


def _lora(found: Mapping[str, Tensor], alpha: float | None) -> LoRAWeights:
    down, up = found["down"], found["up"]
    if up.ndim > 2 and up.shape[2:].numel() == 1:
        up = up.flatten(1)  # a 1x1 convolution's
    if "mid" in found:
        # A kernel's Tucker form: the core [r, s, k, k] between up [out, r] and down [s, in] becomes part of down.
        down = torch.einsum("rs...,si->ri...", found["mid"].float(), down.float().flatten(1))
    scale = found.get("dora_scale")
    if "magnitude" in found:
        scale = found["magnitude"].reshape(-1, *(1,) * (down.ndim - 1))
    return LoRAWeights(down, up, float(len(down)) if alpha is None else alpha, scale)


def _kronecker_factor(found: Mapping[str, Tensor], part: str) -> tuple[Tensor | None, int]:
    """One factor of a LoKr and the rank that it was trained with; rank 0 is a whole one, None one that is missing."""
    if f"lokr_{part}" in found:
        return found[f"lokr_{part}"], 0
    a, b = found.get(f"lokr_{part}_a"), found.get(f"lokr_{part}_b")
    if a is None or b is None:
        return None, 0
    return product(a, b, found.get("lokr_t2") if part == "w2" else None), len(b)


def write_weights(weights: Mapping[str, WeightChange], dialect: str) -> dict[str, Tensor]:
    """The tensors of a file, float32.

    Raises:
        ValueError: a change that is no LoRA; a DoRA in diffusers' dialect that is not one size per output, which
            PEFT cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    for name, change in split(weights).items():
        stem = NAMING[dialect](name)
        down, up = change.down.float(), change.up.float()
        kernel = (1,) * (down.ndim - 2)
        if dialect == "diffusers":
            tensors[f"{stem}.lora_A.weight"] = down
            tensors[f"{stem}.lora_B.weight"] = (up * change.scale).reshape(*up.shape, *kernel)
        else:
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up.reshape(*up.shape, *kernel)
            tensors[f"{stem}.alpha"] = torch.tensor(float(change.alpha))
        if change.dora_scale is None:
            continue
        if dialect != "diffusers":
            tensors[f"{stem}.dora_scale"] = change.dora_scale.float()
        elif change.dora_scale.numel() == len(up) and len(change.dora_scale) == len(up):
            tensors[f"{stem}.lora_magnitude_vector.weight"] = change.dora_scale.float().flatten()
        else:
            raise ValueError(
                f"'{name}' is a DoRA with one size per input, and diffusers' dialect holds one per output: "
                "write it in the dialect comfyui or onetrainer."
            )
    return tensors


def bundled_tokens(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OneTrainer's tokens in a LoRA file: name -> vectors ``[n, C]``. Those behind the text encoder are not meant."""
    ending = ".clip_g"
    return {
        key[len(_BUNDLED) : -len(ending)]: tensor.reshape(-1, tensor.shape[-1]).float()
        for key, tensor in tensors.items()
        if key.startswith(_BUNDLED) and key.endswith(ending)
    }


def write_bundled(tokens: tuple[LearnedToken, ...]) -> dict[str, Tensor]:
    """Tokens as OneTrainer keeps them."""
    return {f"{_BUNDLED}{token.name}.clip_g": vectors_of(token) for token in tokens}


def is_bundled(key: str) -> bool:
    """Whether a tensor is one that `bundled_tokens` reads."""
    return key.startswith(_BUNDLED) and key.endswith(".clip_g")
