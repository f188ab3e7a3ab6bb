"""Textual-inversion files: learned vectors that a prompt names as `embedding:name`.

Source of the idea: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion" (2022). Several vectors take as many places in the prompt.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

_KEYS = ("clip_g", "emb_params")


def load_embedding(path: str | PathLike[str], width: int) -> torch.Tensor:
    """The vectors of a file, float32 [n, width].

    Reads the tensor `clip_g`, else `emb_params`, else the only one there is; [width] counts as one vector. OneTrainer's
    `clip_g_out`, which belongs behind the text encoder, is not used. Raises ValueError for a file that is not
    safetensors, has no such tensor, or was made for a text encoder of another width.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name != "clip_g_out"]  # noqa: SIM118 (the file is no dict)
            wanted = next((key for key in _KEYS if key in names), names[0] if len(names) == 1 else None)
            if wanted is None:
                raise ValueError(
                    f"The embedding {path.name} holds {_listed(names)}; expected one tensor called clip_g: "
                    "use an embedding that was trained for Stable Cascade or SDXL."
                )
            vectors = file.get_tensor(wanted)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The embedding {path.name} could not be read as safetensors ({error}); "
            "a .pt or .bin file must be saved again as .safetensors with a tensor called clip_g."
        ) from error
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or vectors.shape[-1] != width or not len(vectors) or not vectors.is_floating_point():
        raise ValueError(
            f"The embedding {path.name} holds {wanted} of shape {list(vectors.shape)} and type {vectors.dtype}; this "
            f"text encoder takes floating-point vectors of width {width}: use an embedding made for it."
        )
    return vectors.float()


def _listed(names: list[str]) -> str:
    if not names:
        return "no tensor"
    return "the tensors " + ", ".join(sorted(names)[:6]) + (" and more" if len(names) > 6 else "")
