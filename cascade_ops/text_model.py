"""Builds transformers' CLIP text model from a state dict: sizes from the shapes, one copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .tokenizer import END_TOKEN, START_TOKEN, VOCABULARY_SIZE

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
TOKEN_ROWS = "token_rows"

# Tensors of published files that the forward pass does not use.
_UNUSED = {"text_model.embeddings.position_ids", "logit_scale"}
# OpenAI's own models (widths 512 and 768) use the sigmoid approximation; OpenCLIP's, bigG among them, the exact GELU.
_QUICK_GELU_WIDTHS = (512, 768)
_LAYER = "text_model.encoder.layers."


def build_text_model(
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CLIPTextModelWithProjection:
    """A frozen transformers `CLIPTextModelWithProjection` over the tensors of `state_dict`, which it shares.

    `state_dict` has transformers' names. A token table [n, C] with its row ids `token_rows` [n] is spread to
    [49408, C], missing rows filled with the mean row. `config` may say, under transformers' names,
    `num_attention_heads` (else hidden / 64), `hidden_act` (else quick_gelu for widths 512 and 768, gelu for others) and
    `layer_norm_eps` (else 1e-5); `hidden_size`, `intermediate_size` and `num_hidden_layers` in it must agree with the
    tensors, and what else it says is not used. `dtype` defaults to the token table's, `device` to where each tensor
    lies. Raises ValueError for missing or unknown tensors, shapes that do not fit together, and a wrong config.
    """
    from transformers import CLIPTextModelWithProjection

    tensors = {name: tensor for name, tensor in state_dict.items() if name not in _UNUSED}
    _require(TOKEN_TABLE, tensors)
    dtype = dtype or tensors[TOKEN_TABLE].dtype
    if TOKEN_ROWS in tensors:
        tensors[TOKEN_TABLE] = _spread_rows(tensors[TOKEN_TABLE], tensors.pop(TOKEN_ROWS))
    text_config = _text_config(tensors, config or {})
    with torch.device("meta"):
        model = CLIPTextModelWithProjection._from_config(text_config, attn_implementation="sdpa")
    _check(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()})
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(tensors, assign=True)
    embeddings = model.text_model.embeddings
    positions = text_config.max_position_embeddings
    # Not part of the state dict, so still on the meta device.
    embeddings.position_ids = torch.arange(positions, device=embeddings.token_embedding.weight.device)[None]
    return model.requires_grad_(False).eval()


def _text_config(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    config = config.get("text_config") or config
    rows, hidden = _matrix(tensors, TOKEN_TABLE)
    if rows < VOCABULARY_SIZE:
        raise ValueError(
            f"The text encoder's token table has {rows} rows; CLIP's vocabulary needs {VOCABULARY_SIZE}: use a "
            f"complete file, or one that lists its rows in {TOKEN_ROWS}."
        )
    layers = {name[len(_LAYER) :].split(".")[0] for name in tensors if name.startswith(_LAYER)}
    sizes: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "intermediate_size": _matrix(tensors, f"{_LAYER}0.mlp.fc1.weight")[0],
        "max_position_embeddings": _matrix(tensors, "text_model.embeddings.position_embedding.weight")[0],
    }
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size"):
        if name in config and config[name] != sizes[name]:
            raise ValueError(
                f"The text encoder's config says {name} {config[name]}, its tensors say {sizes[name]}; "
                "use the config that belongs to the file."
            )
    heads = config.get("num_attention_heads")
    if heads is None and hidden % 64 == 0:
        heads = hidden // 64
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ValueError(
            f"A text encoder of width {hidden} cannot have num_attention_heads {heads}; give the number of heads "
            "that it was trained with in its config (64 numbers per head is usual)."
        )
    activation = config.get("hidden_act") or ("quick_gelu" if hidden in _QUICK_GELU_WIDTHS else "gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"The text encoder's config says hidden_act {activation!r}; CLIP has gelu or quick_gelu: correct it."
        )
    return CLIPTextConfig(
        **sizes,
        projection_dim=_matrix(tensors, "text_projection.weight")[0],
        num_attention_heads=heads,
        hidden_act=activation,
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
        bos_token_id=START_TOKEN,
        eos_token_id=END_TOKEN,
        pad_token_id=END_TOKEN,
    )


def _spread_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    ids = rows.flatten().tolist()
    whole = not rows.is_floating_point()
    if not whole or table.ndim != 2 or rows.ndim != 1 or len(ids) != len(table) or len(set(ids)) != len(ids):
        raise ValueError(
            f"The text encoder's {TOKEN_ROWS} of shape {list(rows.shape)} does not number the rows of its token table "
            f"of shape {list(table.shape)}, each once; the file is damaged: make it again."
        )
    if min(ids, default=0) < 0 or max(ids, default=0) >= VOCABULARY_SIZE or not {START_TOKEN, END_TOKEN} <= set(ids):
        raise ValueError(
            f"The text encoder's {TOKEN_ROWS} must lie in 0..{VOCABULARY_SIZE - 1} and hold {START_TOKEN} and "
            f"{END_TOKEN}; the file is damaged: make it again."
        )
    # The mean in float32: the sum of many float16 rows loses digits.
    full = table.float().mean(0).to(table.dtype).repeat(VOCABULARY_SIZE, 1)
    full[rows.to(full.device, torch.long)] = table
    return full


def _require(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(
            f"The text encoder lacks the tensor {name}; expected a CLIP text model with projection under transformers' "
            "names: check that this is a text encoder and that the file is complete."
        )
    return tensors[name]


def _matrix(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Size:
    shape = _require(name, tensors).shape
    if len(shape) != 2:
        raise ValueError(f"The text encoder's {name} has the shape {list(shape)}; expected a matrix: check the file.")
    return shape


def _check(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    for name, shape in expected.items():
        if _require(name, tensors).shape != shape:
            raise ValueError(
                f"The text encoder's {name} has the shape {list(tensors[name].shape)}, but the other tensors ask for "
                f"{list(shape)}; check that all tensors come from one file."
            )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise ValueError(
            f"The text encoder holds {len(unknown)} tensors that CLIP does not have ({', '.join(unknown[:3])}); "
            "check that this is a CLIP text encoder."
        )
