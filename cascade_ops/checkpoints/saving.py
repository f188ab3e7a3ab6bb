"""Write safetensors files tensor by tensor, with the metadata that loading wants."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quantized import is_quantized
from .errors import STAGE_TITLES, CheckpointError
from .header import ITEM_BYTES, Entry
from .info import MODELS
from .layouts import split_parts
from .reading import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    stage: str,
    config: Mapping,
    defaults: Mapping | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one model as a safetensors file in the original layout.

    The file appears under its name when it is complete (a temporary file beside it is renamed), and no second copy of
    the weights is made: tensors are moved and cast one at a time.

    Args:
        model: a module of ``cascade_ops.models``, or its state dict under the published names.
        stage: such as ``stage_c``; checked against the tensor names.
        config: the constructor's keyword arguments.
        defaults: sampling defaults: ``width``, ``height``, ``guidance``, ``steps``, ``shift``, ``sampler``.
        name: a short human name, such as ``tiny``.
        dtype: of float tensors; None keeps theirs. Batch norm counters and other integers stay as they are.
        metadata: more of it, such as ``cascade.control`` of a ControlNet: JSON of its kind and of the model it steers.

    Returns:
        The path that was written.

    Raises:
        CheckpointError: the tensors are not those of ``stage`` in the original layout, have 8 bits with scales, or were
            rescaled for float16.
    """
    path = Path(path)
    if isinstance(model, nn.Module) and is_quantized(model):
        raise CheckpointError(
            f"The {STAGE_TITLES.get(stage, stage)} to be written to {path.name} has weights of 8 bits with scales, "
            "expected float weights: load it as auto, bfloat16 or float32."
        )
    if getattr(model, "stream_scale", 1.0) != 1:
        raise CheckpointError(
            f"The {STAGE_TITLES.get(stage, stage)} to be written to {path.name} was rescaled for float16, which a file "
            "does not say, expected the weights as they were published: load it in bfloat16 or float32."
        )
    tensors = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    _check_stage(tensors, stage, path)
    metadata = {**(metadata or {}), "format": "pt", "cascade.stage": stage, "cascade.config": json.dumps(dict(config))}
    if defaults:
        metadata["cascade.defaults"] = json.dumps(dict(defaults))
    if name:
        metadata["cascade.name"] = name

    def entry(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]:
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return kind, tuple(tensor.shape), lambda: tensor.detach().to("cpu", kind)

    write_tensors(path, {key: entry(tensor) for key, tensor in tensors.items()}, metadata)
    return path


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors that are made one at a time: name -> dtype, shape, and a function that gives the tensor.

    Wider types come first, as in the reference implementation, so that every tensor is aligned to its own size.
    """
    order = sorted(tensors, key=lambda key: (-ITEM_BYTES[_NAMES[tensors[key][0]]], key))
    header: dict = {"__metadata__": dict(metadata)}
    position = 0
    for key in order:
        dtype, shape, _ = tensors[key]
        size = prod(shape) * ITEM_BYTES[_NAMES[dtype]]
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    _write_atomically(path, _chunks(text, order, tensors))


def _chunks(text: bytes, order: list[str], tensors: Mapping) -> Iterable[bytes | memoryview]:
    yield len(text).to_bytes(8, "little") + text
    for key in order:
        dtype, shape, make = tensors[key]
        tensor = make()
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"'{key}' was announced as {dtype} {list(shape)} and is {tensor.dtype} {list(tensor.shape)}."
            )
        yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_stage(tensors: Mapping[str, Tensor], stage: str, path: Path) -> None:
    if stage not in MODELS:
        raise CheckpointError(f"The stage {stage!r} is not one that is saved, expected one of {', '.join(MODELS)}.")
    entries = {
        key: Entry(path, key, _NAMES[tensor.dtype], tuple(tensor.shape), 0, 0) for key, tensor in tensors.items()
    }
    parts = split_parts(entries)
    layout = "transformers" if stage in ("text_encoder", "image_encoder") else "original"
    found = parts[0] if parts else None
    if found is None or len(parts) > 1 or (found.stage, found.layout, found.prefix) != (stage, layout, ""):
        what = "no tensors"
        if found is not None:
            what = f"those of a {STAGE_TITLES[found.stage]} in the layout '{found.layout}'"
            what += f" with the prefix '{found.prefix}'" if found.prefix else ""
        raise CheckpointError(
            f"The tensors for {path.name} are {what}, expected those of a {STAGE_TITLES[stage]} in the layout "
            f"'{layout}': give the module itself or the stage that it is."
        )
