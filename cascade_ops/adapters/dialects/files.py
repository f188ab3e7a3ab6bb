"""Reads and writes LoRA files of every dialect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints.errors import CheckpointError, shown
from ...checkpoints.layouts import Recipe
from ...checkpoints.reading import TensorReader
from ...checkpoints.saving import write_tensors
from ...checkpoints.source import open_source
from ..lora import LoRA
from ..tokens import LearnedToken, delta_of, reference_tokens, renamed, tokens_from_metadata, tokens_metadata
from . import named, reference
from .foreign import described, other_lora
from .fusing import loras
from .names import read_name

DIALECTS = ("comfyui", "reference", "diffusers", "onetrainer")


def dialect_of(keys: Iterable[str]) -> str:
    """The dialect that a file's tensor names are in: one of DIALECTS; empty where they are no LoRA of this family.

    OneTrainer's and kohya's forms that ComfyUI takes too count as ``comfyui``.
    """
    keys = list(keys)
    if reference.is_reference(keys):
        return "reference"
    for key in keys:
        if named.is_bundled(key) or (key.startswith("lora_prior_") and not key.startswith("lora_prior_te_text_proj")):
            if named.is_bundled(key) or read_name(key):
                return "onetrainer"
        elif read_name(key):
            return "diffusers" if key.startswith(("prior.", "text_encoder.")) else "comfyui"
    return ""


def read_lora(
    path: str | Path,
    base: nn.Module | None = None,
    *,
    modules: Sequence[str] | None = None,
    tokens: Sequence[tuple[str, str]] = (),
) -> LoRA:
    """Read a LoRA file of any dialect.

    base: the Stage C that it is for; only the reference's layout needs it, where the file does not name its changes.
    modules: module filters that such a file was trained with; None takes what the file says, else ``.attn``, else all.
    tokens: text and initial words of each learned token that is new, in the order of the file, which the reference's
    files do not say; for others, new names (see `tokens.renamed`).

    Raises:
        ValueError: not a safetensors file, no LoRA of Stable Cascade, or one that does not fit `base`.
    """
    source = open_source(path)
    name = shown(source.path)
    if title := other_lora(source.tensors):
        raise CheckpointError(
            f"{name} is a LoRA of {title}, expected one of Stable Cascade's Stage C or its text encoder: choose "
            "another file."
        )
    dialect = dialect_of(source.tensors)
    if not dialect:
        raise CheckpointError(f"{name} {described(source)}.")
    with TensorReader() as reader:
        tensors = {key: reader.read(Recipe((entry,))) for key, entry in source.tensors.items()}
    config, defaults = _json(source.metadata, "cascade.config", name), _json(source.metadata, "cascade.defaults", name)
    said = tokens_from_metadata(source.metadata, name)
    if dialect == "reference":
        weights = _reference_weights(tensors, base, modules, config, name)
        known = renamed(reference_tokens(tensors, said, name), tokens, name)
        unread = tuple(key for key in tensors if not reference.is_reference([key]) and "embeddings." not in key)
        return LoRA(weights, known, config, name, unread, defaults)
    plain = {key: tensor for key, tensor in tensors.items() if not named.is_bundled(key)}
    weights, unread = named.read_weights(plain)
    known = _named_tokens(tensors, said)
    if not weights and not known:
        raise CheckpointError(f"{name} {described(source)}.")
    return LoRA(weights, renamed(known, tokens, name), config, name, unread, defaults)


def _reference_weights(
    tensors: Mapping[str, Tensor], base: nn.Module | None, modules: Sequence[str] | None, config: Mapping, name: str
) -> dict:
    if modules is not None:
        filters = [tuple(modules)]
    elif "modules" in config:
        filters = [tuple(config["modules"])]
    else:
        filters = [reference.DEFAULT_MODULES, ("",)]
    if base is None:
        raise ValueError(
            f"{name} is in the reference's layout, where changes have no names, expected the Stage C that it was "
            "trained on with it: connect or give the model."
        )
    return reference.read_weights(tensors, reference.adaptable(base), filters, name)


def _named_tokens(tensors: Mapping[str, Tensor], said: Sequence[Mapping]) -> tuple[LearnedToken, ...]:
    bundled = named.bundled_tokens(tensors)
    tokens = []
    for entry in said:
        vectors = bundled.pop(str(entry["token"]).strip("[]<>"), None)
        if vectors is not None:
            entry = {**entry, "vectors": vectors}
        tokens.append(LearnedToken(**entry))
    # OneTrainer's prompts have the name in angle brackets.
    tokens += [LearnedToken(f"<{name}>", vectors=vectors) for name, vectors in bundled.items()]
    return tuple(tokens)


def read_tokens(path: str | Path, tokens: Sequence[tuple[str, str]] = ()) -> tuple[LearnedToken, ...]:
    """The learned tokens of a file: a textual-inversion file (``clip_g``), one in the reference's form, or a LoRA's.

    tokens: what they are where the file does not say, see `read_lora`.

    Raises:
        ValueError: not a safetensors file, or one without tokens.
    """
    source = open_source(path)
    name = shown(source.path)
    said = tokens_from_metadata(source.metadata, name)
    with TensorReader() as reader:
        tensors = {
            key: reader.read(Recipe((entry,)))
            for key, entry in source.tensors.items()
            if key == "clip_g" or key.startswith("embeddings.") or named.is_bundled(key)
        }
    if "clip_g" in tensors:
        vectors = tensors["clip_g"].float()
        entry = {"token": f"[{source.path.stem}]", **(said[0] if said else {})}
        found = LearnedToken(**{**entry, "vectors": vectors.reshape(-1, vectors.shape[-1])})
        return renamed([found], tokens, name)
    every = reference_tokens(tensors, said, name) or _named_tokens(tensors, said)
    if not every:
        raise CheckpointError(
            f"{name} holds no learned token, expected a tensor called clip_g or embeddings.embeddings, or a LoRA with "
            "tokens: choose another file."
        )
    return renamed(every, tokens, name)


def write_lora(
    lora: LoRA,
    path: str | Path,
    dialect: str = "comfyui",
    *,
    base: nn.Module | None = None,
    modules: Sequence[str] | None = None,
    defaults: Mapping[str, float | str] | None = None,
) -> Path:
    """Write a LoRA as a safetensors file, float32; it appears under its name when it is complete.

    base, modules: the Stage C and the module filters, for the reference's dialect alone; modules None takes what the
    LoRA says, else ``.attn``. defaults: sampling values of Stage C that it wants, such as ``{"guidance": 1.0}`` of one
    for few steps, see `LoRA`; None takes the LoRA's own.

    The metadata holds the tokens, what training said (``cascade.config``) and, for tools that show them, kohya's
    ``ss_network_dim`` and ``ss_network_alpha``.

    Raises:
        ValueError: an unknown dialect, a change that it has no place for, or one that is no LoRA.
    """
    path = Path(path)
    if defaults is not None:
        lora = replace(lora, defaults=defaults)
    if dialect not in DIALECTS:
        raise ValueError(f"The LoRA dialect {dialect!r} is unknown, expected one of {', '.join(DIALECTS)}.")
    config = dict(lora.config)
    weights = loras(lora.weights)
    config.setdefault("rank", max(change.rank for change in weights.values()))
    config.setdefault("alpha", next(iter(weights.values())).alpha)
    metadata = {"format": "pt", "cascade.stage": "lora", **tokens_metadata(lora.tokens)}
    if dialect == "reference":
        if base is None:
            raise ValueError("The reference's dialect names no modules, expected the base Stage C with it: give base.")
        filters = tuple(modules or config.get("modules") or reference.DEFAULT_MODULES)
        config["modules"] = list(filters)
        tensors = reference.write_weights(lora.weights, reference.adaptable(base), filters)
        tensors |= write_reference_tokens(lora.tokens)
    else:
        tensors = named.write_weights(lora.weights, dialect)
        metadata |= {"ss_network_dim": str(config["rank"]), "ss_network_alpha": str(config["alpha"])}
        metadata |= {"ss_network_module": "networks.lora"}
        if dialect == "onetrainer":
            tensors |= named.write_bundled(lora.tokens)
    metadata["cascade.config"] = json.dumps(config)
    if lora.defaults:
        metadata["cascade.defaults"] = json.dumps(dict(lora.defaults))
    write_tensors(path, {key: _entry(tensor) for key, tensor in tensors.items()}, metadata)
    return path


def write_reference_tokens(tokens: Sequence[LearnedToken]) -> dict[str, Tensor]:
    """Tokens as the reference keeps them: changes of rows of the token table, and which rows. New ones follow the
    vocabulary.

    Raises:
        ValueError: a token of several vectors, or one whose row or change is not known.
    """
    if not tokens:
        return {}
    wide = [token for token in tokens if token.count > 1]
    if wide:
        raise ValueError(
            f"The learned token {wide[0].token!r} has {wide[0].count} vectors, and the reference's layout holds one "
            "for each token: write another dialect, or train it with one vector."
        )
    numbered = numbered_tokens(tokens)
    return {
        "embeddings.embeddings": torch.cat([delta_of(token) for token in numbered]),
        "embeddings.indices": torch.tensor([token.row for token in numbered]),
    }


def numbered_tokens(tokens: Sequence[LearnedToken]) -> list[LearnedToken]:
    """The tokens with their rows in the token table: a word's own, and for new ones those after the vocabulary."""
    from ...tokenizer import VOCABULARY_SIZE, default_tokenizer, is_new_token, token_id

    taken = {token.row for token in tokens}
    free = (row for row in range(VOCABULARY_SIZE, VOCABULARY_SIZE + 2 * len(tokens) + 1) if row not in taken)
    result = []
    for token in tokens:
        if token.row is None:
            token = replace(
                token, row=next(free) if is_new_token(token.token) else token_id(token.token, default_tokenizer())
            )
        result.append(token)
    return result


def _entry(tensor: Tensor):
    tensor = tensor.detach().cpu().contiguous()
    return tensor.dtype, tuple(tensor.shape), lambda: tensor


def _json(metadata: Mapping[str, str], key: str, name: str) -> dict:
    """What our own files say of their training (``cascade.config``) and of sampling (``cascade.defaults``)."""
    if metadata.get("cascade.stage") != "lora" or key not in metadata:
        return {}
    try:
        said = json.loads(metadata[key])
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(
            f"{name} has in its metadata '{key}' {metadata[key][:60]!r}, expected a JSON object: save it again."
        )
    return said
