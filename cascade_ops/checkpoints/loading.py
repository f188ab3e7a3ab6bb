"""Build a model from a checkpoint: recognise, check against the header, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..quantized import with_eight_bits
from .eight_bits import eight_bit_dtypes, read_in_eight_bits
from .errors import CheckpointError, shown
from .info import MODELS, FileInfo, inspect_file
from .reading import TensorReader

if TYPE_CHECKING:
    from ..text import TextEncoder

# From the module, which has no weights yet, the function from a float tensor's name and its values, in the dtype of the
# file, to what the module gets.
Convert = Callable[[nn.Module], Callable[[str, Tensor], Tensor]]

_UNINITIALISED = (torch.empty, torch.rand, torch.randn)
_THREADS = 4


class ParametersWithoutMemory(TorchFunctionMode):
    """Inside this context, layers make their weights on the meta device.

    Only what layers allocate to be initialised or loaded goes there; constants that a module computes (ranges,
    frequencies) stay real, so that a module whose weights are assigned afterwards is whole.
    """

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _UNINITIALISED:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def load(
    path: str | Path | FileInfo,
    expect: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    eight_bits: torch.dtype | None = None,
    convert: Convert | None = None,
) -> tuple[Any, FileInfo]:
    """Load one model from a file, a model folder or a combined checkpoint, in evaluation mode and without gradients.

    Args:
        path: a file, a folder, or what ``inspect_file`` said about it.
        expect: the stage that is wanted, such as ``stage_c``; picks the part of a combined checkpoint. None takes
            whatever a single file holds.
        dtype: of the float tensors; None keeps the file's (8-bit floats become bfloat16).
        device: where every tensor goes as soon as it is read.
        eight_bits: what the large matrices of Stage C or Stage B become as soon as they are read (``int8`` or a
            float8, see `quantized`); None leaves them float.
        convert: takes the place of `dtype` for a model of these classes, tensor by tensor.

    Returns:
        The module (``StageA``, ``StageB``, ``StageC``, ``LatentEncoder``, ``Previewer``, ``ControlNet``,
        ``IPAdapter``, ``TextEncoder`` or, for an image encoder, transformers' ``CLIPVisionModelWithProjection``) and
        what it is.

    Raises:
        CheckpointError: another stage than expected, or one that has no weights of 8 bits; several models and no
            ``expect``, or tensors that are missing, unknown or of a wrong shape. All of this is found from the header,
            before a tensor is read (for a text encoder, whose table may be stored in part, right after).
    """
    whole = path if isinstance(path, FileInfo) else inspect_file(path)
    info = _pick(whole, expect)
    if info.unknown:
        raise CheckpointError(
            f"{shown(info.path)} ({info.title}) does not say {' and '.join(info.unknown)}, which its tensors cannot "
            "tell and no known release matches: add them to the JSON under 'cascade.config' in the file's metadata."
        )
    if info.leftover:
        _refuse_unknown(info, info.leftover)
    small = {} if eight_bits is None else eight_bit_dtypes(info, eight_bits)
    if info.stage == "text_encoder":
        return _text_encoder(info, _read(info, dtype, device)), info
    module = _build(info)
    expected = module.state_dict()
    _check(info, expected)
    with_eight_bits(module, small)
    tensors = _read(info, dtype, device, small, convert and convert(module))
    for name, wanted in expected.items():
        if name in tensors and tensors[name].is_floating_point() and not wanted.is_floating_point():
            tensors[name] = tensors[name].to(wanted.dtype)  # counters that a cast of the whole file turned to floats
    module.load_state_dict(tensors, strict=False, assign=True)
    return module.to(device).eval().requires_grad_(False), info


def _pick(whole: FileInfo, expect: str | None) -> FileInfo:
    if expect is not None:
        if expect not in MODELS:
            raise ValueError(f"A model of the kind {expect!r} was asked for, expected one of {', '.join(MODELS)}.")
        return whole.component(expect)
    if whole.components:
        held = ", ".join(part.stage for part in whole.components)
        raise CheckpointError(
            f"{shown(whole.path)} is a combined checkpoint of {held}, expected a single model: say which one is wanted."
        )
    if whole.stage not in MODELS:
        return whole.component("")  # none of its business here: say what it is
    return whole


def _text_encoder(info: FileInfo, tensors: dict[str, Tensor]) -> TextEncoder:
    from ..text import TextEncoder

    try:
        return TextEncoder.from_state_dict(tensors, info.config)
    except ValueError as error:
        raise CheckpointError(f"{shown(info.path)}: {error}") from error


def _build(info: FileInfo) -> nn.Module:
    """The module without memory for its weights."""
    try:
        with ParametersWithoutMemory():
            if info.stage == "image_encoder":
                from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

                return CLIPVisionModelWithProjection(CLIPVisionConfig(**info.config))
            from .. import models

            classes = {
                "stage_a": models.StageA,
                "stage_b": models.StageB,
                "stage_c": models.StageC,
                "latent_encoder": models.LatentEncoder,
                "previewer": models.Previewer,
                "controlnet": models.ControlNet,
                "ip_adapter": models.IPAdapter,
            }
            return classes[info.stage](**info.config)
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{shown(info.path)} describes a {info.title} that cannot be built ({error}), expected the arguments of "
            "that model: correct or remove 'cascade.config' in its metadata, or the config.json beside it."
        ) from error


def _check(info: FileInfo, expected: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with the module's before anything is read."""
    missing = [name for name in expected if name not in info.recipes and not name.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"{shown(info.path)} ({info.title}) lacks the tensor '{missing[0]}' ({len(missing)} of the {len(expected)} "
            "expected ones are missing): download or save the whole file again."
        )
    unknown = [name for name in info.recipes if name not in expected]
    if unknown:
        _refuse_unknown(info, unknown)
    wrong = [name for name, recipe in info.recipes.items() if recipe.shape != tuple(expected[name].shape)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{shown(info.path)} ({info.title}) has '{name}' with shape {list(info.recipes[name].shape)}, expected "
            f"{list(expected[name].shape)} ({len(wrong)} of {len(expected)} tensors differ): it fits no known block, "
            "choose another file or correct 'cascade.config' in its metadata."
        )


def _refuse_unknown(info: FileInfo, names: Sequence[str]) -> NoReturn:
    raise CheckpointError(
        f"{shown(info.path)} ({info.title}) holds the tensor '{names[0]}' ({len(names)} in all) that the model has no "
        "place for, expected only the tensors of a known layout: save the file again without them."
    )


def _read(
    info: FileInfo,
    dtype: torch.dtype | None,
    device: torch.device | str,
    small: Mapping[str, torch.dtype] | None = None,
    converted: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """All tensors under their names; those in `small` as 8-bit values, with their scales beside them."""

    def one(name: str) -> dict[str, Tensor]:
        if small and name in small:
            return read_in_eight_bits(reader, info, name, small[name], device)
        tensor = reader.read(info.recipes[name], None if converted else dtype, device)
        return {name: converted(name, tensor) if converted and tensor.is_floating_point() else tensor}

    tensors: dict[str, Tensor] = {}
    # New memory and a copy out of the system's cache are work for more than one core.
    with TensorReader() as reader, ThreadPoolExecutor(_THREADS) as threads:
        waiting = [threads.submit(one, name) for name in info.recipes]
        try:
            for future in waiting:
                tensors |= future.result()
        finally:
            threads.shutdown(cancel_futures=True)  # after an error or an interruption nothing more is begun
    return tensors
