"""Read the large matrices of a checkpoint as 8-bit values, see `quantized`; never more than one of them is float."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quantized import FLOAT8, SCALE, STAGES, is_matrix, matrices, quantized
from .errors import STAGE_TITLES, CheckpointError, shown
from .reading import TORCH_DTYPES, TensorReader

if TYPE_CHECKING:
    from .info import FileInfo


def eight_bit_dtypes(info: FileInfo, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors of a file that are kept in 8 bits, and the dtype of each.

    Matrices that the file has as 8-bit floats keep those, in the last level of Stage C too: nothing is lost by it.

    Raises:
        CheckpointError: another stage; or int8 for a file of 8-bit floats.
    """
    if info.stage not in STAGES:
        wanted = " and ".join(STAGE_TITLES[stage] for stage in STAGES)
        raise CheckpointError(
            f"{shown(info.path)} holds {info.title} and weights of 8 bits were asked for, expected {wanted}, the only "
            "ones that have them: choose auto."
        )
    stored = {name: TORCH_DTYPES.get(info.recipes[name].dtype) for name in info.recipes if is_matrix(name)}
    own = {name: kind for name, kind in stored.items() if kind in FLOAT8}
    if own and dtype not in FLOAT8:
        raise CheckpointError(
            f"{shown(info.path)} ({info.title}) holds 8-bit floats, which int8 would round a second time, expected "
            "weights of 16 or 32 bits for it: choose 'float8 weights', which keeps those of the file."
        )
    return dict.fromkeys(matrices(info.stage, stored), dtype) | own


def read_in_eight_bits(
    reader: TensorReader, info: FileInfo, name: str, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """The 8-bit values of one matrix under its name, and their scales."""
    recipe = info.recipes[name]
    stored = TORCH_DTYPES.get(recipe.dtype)
    weight = reader.read(recipe, stored if stored in FLOAT8 else None, device)
    try:
        values, scale = quantized(weight, dtype)
    except ValueError as error:
        raise CheckpointError(
            f"{shown(info.path)} ({info.title}) cannot be rounded to 8 bits at '{name}': {error}, expected finite "
            "weights: download or save the file again."
        ) from error
    return {name: values, name + SCALE: scale}
