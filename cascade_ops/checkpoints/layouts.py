"""Tell the parts of a file apart and translate their tensor names to the published ones.

A translated part is a ``Recipes``: published tensor name -> where its bytes are. Nothing is read here.

Layouts, from the formats that the release and its users have written:

* original: the published single files;
* diffusers: ``attention.to_q/to_k/to_v/to_out.0`` in place of the fused ``attention.attn``, Stage B's ``clip_mapper``
  called ``clip_txt_pooled_mapper``, Stage A's codebook ``vquantizer.embedding``;
* ComfyUI: prefixes per part in one combined file, q/k/v fused or split, the text projection transposed;
* wrappers such as ``state_dict.module.`` in front of every name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .header import Entry

WRAPPERS = ("state_dict.", "module.", "_orig_mod.")
_NETWORK_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SPLIT_QKV = re.compile(r"^(.*\.attention\.)(?:attn\.)?to_([qkv])\.(weight|bias)$")
_SPLIT_OUT = re.compile(r"^(.*\.attention\.)(?:attn\.)?to_out\.0\.(weight|bias)$")
# Part of CLIP's contrastive loss and of no encoder; the second is what the tiny family's file keeps to be measured by.
_CLIP_TRAINING = ("logit_scale", "text_to_image_projection.weight")
_LORA_MARKS = (".lora_down", ".lora_up", ".lora_A", ".lora_B", ".hada_w", ".lokr_w", ".oft_", ".dora_scale")


@dataclass(frozen=True)
class Recipe:
    """One published tensor: ``pieces`` stacked along the first dimension, then transposed if ``transpose``."""

    pieces: tuple[Entry, ...]
    transpose: bool = False

    @property
    def dtype(self) -> str:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        shape = (sum(piece.shape[0] for piece in self.pieces), *first[1:]) if len(self.pieces) > 1 else first
        return shape[::-1] if self.transpose else shape


Recipes = dict[str, Recipe]


@dataclass(frozen=True)
class Part:
    """One model inside a file: its stage, the layout it was stored in, the prefix it had, its tensors translated."""

    stage: str
    layout: str
    prefix: str
    recipes: Recipes


def split_parts(tensors: dict[str, Entry]) -> list[Part]:
    """Recognise every model in a file. Tensors that belong to none come last as a part of stage ``unknown``."""
    if _is_lora(tensors):
        return [Part("lora", "original", "", _plain(tensors))]
    prefix, inner = _unwrap(tensors)
    parts: list[Part] = []
    for group_prefix, group in _groups(inner):
        stage = _recognise(group)
        layout, recipes = _translate(stage, group)
        if group_prefix:
            layout = "comfyui split q/k/v" if layout == "comfyui split q/k/v" else "comfyui"
        parts.append(Part(stage, layout, prefix + group_prefix, recipes))
    known = [part for part in parts if part.stage != "unknown"]
    return known + [part for part in parts if part.stage == "unknown"]


def _unwrap(tensors: dict[str, Entry]) -> tuple[str, dict[str, Entry]]:
    """Take off wrappers that every name carries."""
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), None):
        tensors = _under(tensors, wrapper)
        prefix += wrapper
    return prefix, tensors


def _under(tensors: dict[str, Entry], prefix: str) -> dict[str, Entry]:
    return {name[len(prefix) :]: entry for name, entry in tensors.items() if name.startswith(prefix)}


def _groups(tensors: dict[str, Entry]) -> list[tuple[str, dict[str, Entry]]]:
    """Cut a file into the parts that prefixes mark; what has no known prefix stays together."""
    prefixes = list(_NETWORK_PREFIXES)
    if any(name.startswith("text_encoder.clip_g.") for name in tensors):
        prefixes.append("text_encoder.")
    if any(name.startswith("clip_l_vision.") for name in tensors):
        prefixes.append("clip_l_vision.")
    for vae in ("vae.", ""):
        if f"{vae}encoder.backbone.0.0.weight" in tensors:
            prefixes.append(f"{vae}encoder.")
        if f"{vae}previewer.blocks.0.weight" in tensors:
            prefixes.append(f"{vae}previewer.")
    if not any(prefix.startswith("vae.") for prefix in prefixes):
        prefixes.append("vae.")
    groups = []
    rest = dict(tensors)
    for prefix in prefixes:
        if group := _under(rest, prefix):
            groups.append((prefix, group))
            rest = {name: entry for name, entry in rest.items() if not name.startswith(prefix)}
    text = {name: e for name, e in rest.items() if name.startswith(("text_model.", "text_projection"))}
    image = {name: e for name, e in rest.items() if name.startswith(("vision_model.", "visual_projection"))}
    if text and image:  # a whole transformers CLIPModel
        groups += [("", text), ("", image)]
        rest = {name: e for name, e in rest.items() if name not in text and name not in image and name != "logit_scale"}
    if rest:
        groups.append(("", rest))
    return groups


def _is_lora(tensors: dict[str, Entry]) -> bool:
    return any(mark in name for name in tensors for mark in _LORA_MARKS)


def _recognise(names: dict[str, Entry]) -> str:
    """Say which model a group of names without prefix is, by tensors that only this model has."""
    has = names.__contains__
    if has("clip_txt_mapper.weight"):
        return "stage_c"
    if has("effnet_mapper.0.weight"):
        return "stage_b"
    if has("vquantizer.codebook.weight") or has("vquantizer.embedding.weight"):
        return "stage_a"
    if has("projections.0.0.weight") and any(name.startswith("backbone.") for name in names):
        return "controlnet"
    # Adapters of other model families have an image_proj of another kind, or count their blocks otherwise.
    if has("image_proj.proj.weight") and has("ip_adapter.0.to_k_ip.weight"):
        return "ip_adapter"
    if has("backbone.0.0.weight") and has("mapper.0.weight"):
        return "latent_encoder"
    if has("blocks.0.weight") and has("blocks.2.running_mean"):
        return "previewer"
    if any(name.endswith("text_model.embeddings.token_embedding.weight") for name in names):
        return "text_encoder"
    if any(name.endswith("vision_model.embeddings.patch_embedding.weight") for name in names):
        return "image_encoder"
    if (has("clip_g") and len(names["clip_g"].shape) == 2) or has("embeddings.embeddings"):
        return "embedding"
    return "unknown"


def _plain(tensors: dict[str, Entry]) -> Recipes:
    return {name: Recipe((entry,)) for name, entry in tensors.items()}


def _translate(stage: str, tensors: dict[str, Entry]) -> tuple[str, Recipes]:
    if stage in ("stage_c", "stage_b"):
        return _network(stage, tensors)
    if stage == "stage_a" and "vquantizer.embedding.weight" in tensors:
        renamed = {name.replace("vquantizer.embedding.", "vquantizer.codebook."): e for name, e in tensors.items()}
        return "diffusers", _plain(renamed)
    if stage == "latent_encoder":  # ComfyUI keeps ImageNet's mean and deviation in the encoder, ours are constants
        return "original", _plain({name: e for name, e in tensors.items() if name not in ("mean", "std")})
    if stage in ("text_encoder", "image_encoder"):
        return "transformers", _clip(tensors)
    return "original", _plain(tensors)


def _network(stage: str, tensors: dict[str, Entry]) -> tuple[str, Recipes]:
    """Stage B or C: fuse split q/k/v, undo diffusers' renames."""
    recipes: Recipes = {}
    layout = "original"
    fused: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        if match := _SPLIT_QKV.match(name):
            block, letter, leaf = match.groups()
            layout = "comfyui split q/k/v" if ".attn.to_" in name else "diffusers"
            fused.setdefault(f"{block}attn.in_proj_{leaf}", {})[letter] = entry
        elif match := _SPLIT_OUT.match(name):
            recipes[f"{match[1]}attn.out_proj.{match[2]}"] = Recipe((entry,))
        elif stage == "stage_b" and name.startswith("clip_txt_pooled_mapper."):
            layout = "diffusers"
            recipes[name.replace("clip_txt_pooled_mapper.", "clip_mapper.")] = Recipe((entry,))
        else:
            recipes[name] = Recipe((entry,))
    for name, pieces in fused.items():
        # A missing third leaves a tensor of the wrong height, which loading reports under its published name.
        recipes[name] = Recipe(tuple(pieces[letter] for letter in "qkv" if letter in pieces))
    return layout, recipes


def _clip(tensors: dict[str, Entry]) -> Recipes:
    """A CLIP text or image encoder under transformers' names, without what it computes itself or only trains with."""
    recipes: Recipes = {}
    for name, entry in tensors.items():
        for prefix in ("clip_g.", "clip_l.", "transformer."):
            name = name.removeprefix(prefix)
        if name in _CLIP_TRAINING or name.endswith("embeddings.position_ids"):
            continue
        if name == "text_projection":  # OpenCLIP stores it as the matrix that multiplies from the right
            recipes.setdefault("text_projection.weight", Recipe((entry,), transpose=True))
        else:
            recipes[name] = Recipe((entry,))
    return recipes
