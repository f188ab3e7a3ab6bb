"""Say what a checkpoint is from its header alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from .config_json import from_config_json
from .errors import STAGE_TITLES, CheckpointError, shown
from .header import ITEM_BYTES
from .layouts import Part, Recipes, split_parts
from .releases import RELEASES, SAMPLING_DEFAULTS
from .shapes import control_of, infer
from .source import Source, open_source

_DTYPE_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "token_rows")
MODELS = (
    "stage_a", "stage_b", "stage_c", "latent_encoder", "previewer", "controlnet", "ip_adapter", "text_encoder",
    "image_encoder",
)  # fmt: skip


@dataclass(frozen=True)
class FileInfo:
    """What one checkpoint, or one part of a combined checkpoint, is.

    Attributes:
        path: as it was given: a file, or a model folder.
        stage: ``stage_a``, ``stage_b``, ``stage_c``, ``latent_encoder``, ``previewer``, ``controlnet``,
            ``ip_adapter``, ``text_encoder``, ``image_encoder``; ``combined`` (see ``components``), ``lora``,
            ``embedding`` or ``unknown``.
        size: the published size (``3.6B``, ``1B lite``, ``1.5B``, ``700M lite``, ...), else the name that the
            file's metadata gives (``tiny``), else ``custom``.
        rank: order of preference within a stage: 0 full size, 1 lite, 2 custom, 3 named by its own metadata.
        layout: ``original``, ``diffusers``, ``transformers``, ``comfyui``, ``comfyui split q/k/v``,
            ``comfyui combined``.
        prefix: what stood before every tensor name, such as ``state_dict.module.``.
        dtypes: float types of the weights, the most frequent by bytes first (``fp32``, ``bf16``, ``fp16``, ``fp8``).
        parameters: exact count; batch norm statistics are buffers and not counted.
        tensors: number of tensors under their published names.
        weight_bytes: size of those tensors.
        config: constructor arguments of the model.
        unknown: constructor arguments that neither shapes, metadata nor a known release give;
            such a file is not loaded.
        leftover: names of tensors beside the models that belong to none; such a file is not loaded.
        defaults: sampling defaults: width, height (pixels), guidance, steps, shift, sampler; empty where none apply.
        components: the parts of a combined checkpoint.
        control: of a ControlNet its ``kind`` (``canny``, ``inpainting``, ``super_resolution``, ``identity``) where
            metadata or shapes tell it, and the size of the Stage C that it was trained with as ``base``.
    """

    path: Path
    stage: str
    size: str
    rank: int
    layout: str
    prefix: str
    dtypes: tuple[str, ...]
    parameters: int
    tensors: int
    weight_bytes: int
    config: dict
    unknown: tuple[str, ...]
    defaults: dict
    leftover: tuple[str, ...] = ()
    components: tuple[FileInfo, ...] = ()
    recipes: Recipes = field(default_factory=dict, repr=False, compare=False)
    control: dict = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Stage and size in words: ``Stage C 1B lite``."""
        words = STAGE_TITLES[self.stage]
        return f"{words} {self.size}" if self.stage in MODELS else words

    def component(self, stage: str) -> FileInfo:
        """This file itself, or the part of a combined checkpoint, that is a ``stage``.

        Raises:
            CheckpointError: the file is or holds something else.
        """
        found = [part for part in self.components or (self,) if part.stage == stage]
        if len(found) == 1:
            return found[0]
        if self.stage == "unknown":
            names = ", ".join(f"'{name}'" for name in list(self.recipes)[:3]) or "no tensors"
            what = f"holds tensors that belong to no known Stable Cascade model (such as {names})"
        elif self.components:
            what = f"is a combined checkpoint of {_listed(part.title for part in self.components)}"
        else:
            what = f"holds {self.title}" if self.stage in MODELS else f"is a {self.title}"
        wanted = STAGE_TITLES.get(stage, "a Stable Cascade model")
        advice = {
            "lora": "load it with a LoRA loader on top of the base model",
            "embedding": "put it into the embeddings folder and write embedding:name in a prompt",
            "unknown": "choose another file",
        }.get(self.stage, f"choose another file, or load this one where {self.title} belongs")
        raise CheckpointError(f"{shown(self.path)} {what}, expected {wanted}: {advice}.")

    def as_dict(self) -> dict:
        """Everything but the tensor list, as plain JSON types."""
        return {
            "path": str(self.path),
            "stage": self.stage,
            "size": self.size,
            "layout": self.layout,
            "prefix": self.prefix,
            "dtypes": list(self.dtypes),
            "parameters": self.parameters,
            "tensors": self.tensors,
            "weight_bytes": self.weight_bytes,
            "config": self.config,
            "unknown": list(self.unknown),
            "defaults": self.defaults,
            "leftover": list(self.leftover),
            "control": self.control,
            "components": [part.as_dict() for part in self.components],
        }

    def describe(self) -> str:
        """A few lines for a person."""
        if self.components:
            lines = [f"{shown(self.path)}: {self.title} ({self.layout}, {_bytes(self.weight_bytes)})"]
            for part in self.components:
                lines += ["", *("  " + line for line in part._lines(part.prefix.rstrip(".") or "(no prefix)"))]
            return "\n".join(lines)
        return "\n".join(self._lines(shown(self.path)))

    def _lines(self, head: str) -> list[str]:
        layout = f"{self.layout}, names begin with '{self.prefix}'" if self.prefix else self.layout
        lines = [
            f"{head}: {self.title}",
            f"  parameters  {self.parameters:,} in {self.tensors:,} tensors, {_bytes(self.weight_bytes)}",
            f"  dtype       {', '.join(self.dtypes) or 'no floats'}",
            f"  layout      {layout}",
        ]
        if self.control:
            lines.append("  control     " + ", ".join(f"{name} {value}" for name, value in self.control.items()))
        if self.defaults:
            lines.append("  sampling    " + ", ".join(f"{name} {value}" for name, value in self.defaults.items()))
        if self.config:
            lines.append("  config      " + json.dumps(self.config))
        if self.leftover:
            lines.append(f"  not placed  {len(self.leftover)} tensors, the first '{self.leftover[0]}'")
        if self.unknown:
            lines.append(f"  not known   {', '.join(self.unknown)} (the file's metadata does not say)")
        return lines


def inspect_file(path: str | Path) -> FileInfo:
    """Say what the checkpoint at ``path`` is, from its header alone.

    ``path`` is a safetensors file, a shard or the index of a sharded model, or a diffusers or transformers model
    folder. A file that is sound but no model of this family comes back with stage ``unknown``, ``lora`` or
    ``embedding``.

    Raises:
        CheckpointError: nothing there, not safetensors (a pickle, a web page), cut short, or like no known block.
    """
    source = open_source(path)
    parts = split_parts(source.tensors)
    if not parts:
        parts = [Part("unknown", "original", "", {})]
    models = [part for part in parts if part.stage in MODELS]
    leftover = tuple(
        part.prefix + name for part in parts if models and part.stage not in MODELS for name in part.recipes
    )
    if len(models) < 2:
        return replace(_describe_part(source, parts[0]), leftover=leftover)
    components = tuple(replace(_describe_part(source, part), leftover=leftover) for part in models)
    return FileInfo(
        path=source.path,
        stage="combined",
        size="",
        rank=min(part.rank for part in components),
        layout="comfyui combined" if any(part.prefix for part in components) else "transformers",
        prefix="",
        dtypes=tuple(dict.fromkeys(dtype for part in components for dtype in part.dtypes)),
        parameters=sum(part.parameters for part in components),
        tensors=sum(part.tensors for part in components),
        weight_bytes=sum(part.weight_bytes for part in components),
        config={},
        unknown=(),
        defaults={},
        leftover=leftover,
        components=components,
    )


def _describe_part(source: Source, part: Part) -> FileInfo:
    shapes = {name: recipe.shape for name, recipe in part.recipes.items()}
    parameters = sum(prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS))
    counted: Counter[str] = Counter()
    for recipe in part.recipes.values():
        if recipe.dtype in _DTYPE_NAMES:
            counted[_DTYPE_NAMES[recipe.dtype]] += prod(recipe.shape) * ITEM_BYTES[recipe.dtype]
    info = FileInfo(
        path=source.path,
        stage=part.stage,
        size="custom",
        rank=2,
        layout=part.layout,
        prefix=part.prefix,
        dtypes=tuple(name for name, _ in counted.most_common()),
        parameters=parameters,
        tensors=len(part.recipes),
        weight_bytes=sum(prod(recipe.shape) * ITEM_BYTES[recipe.dtype] for recipe in part.recipes.values()),
        config={},
        unknown=(),
        defaults={},
        recipes=part.recipes,
    )
    return _with_config(info, source, shapes) if part.stage in MODELS else info


def _with_config(info: FileInfo, source: Source, shapes: Mapping[str, tuple[int, ...]]) -> FileInfo:
    """Add config, size and defaults: shapes first, then a known release, then config.json, then the file's metadata."""
    said = source.metadata if source.metadata.get("cascade.stage") == info.stage else {}
    inferred = infer(info.stage, info.layout, shapes, shown(info.path))
    release = RELEASES.get((info.stage, info.parameters))
    config = inferred.proven | inferred.usual
    if release:
        config |= release.config
    config |= from_config_json(info.stage, source.config_json or {}, inferred.proven)
    config |= _json(said, "cascade.config", info.path)
    defaults = SAMPLING_DEFAULTS.get(info.stage, {}) | _json(said, "cascade.defaults", info.path)
    unknown = tuple(name for name in inferred.open if name not in config)
    name = said.get("cascade.name")
    if release:
        size, rank = release.size, release.rank
    else:
        size, rank = (name, 3) if name else ("custom", 2)
    control = control_of(config) | _json(said, "cascade.control", info.path) if info.stage == "controlnet" else {}
    return replace(info, size=size, rank=rank, config=config, unknown=unknown, defaults=defaults, control=control)


def _json(metadata: Mapping[str, str], key: str, path: Path) -> dict:
    if key not in metadata:
        return {}
    try:
        value = json.loads(metadata[key])
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{shown(path)} has in its metadata '{key}' {metadata[key][:60]!r}, expected a JSON object: save it again."
        )
    return value


def _listed(words) -> str:
    words = list(words)
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
