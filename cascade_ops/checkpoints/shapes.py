"""Read a model's constructor arguments from the shapes of its tensors.

Every function takes the published tensor names with their shapes and returns three things in one ``Inferred``:
the arguments that shapes prove, the ones that are usual where shapes are silent (heads of 64, as in every release),
and the names of those that nothing says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..models.controlnet import LARGE_BLOCKS, LARGE_WIDTHS, PUBLISHED_PROJ_BLOCKS
from .errors import CheckpointError
from .releases import DIFFUSERS_SCALE_FACTOR, SCALE_FACTOR

Shapes = Mapping[str, tuple[int, ...]]
HEAD_WIDTH = 64
CLIP_VOCABULARY = 49_408
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d+)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Inferred:
    """``proven`` and ``usual`` constructor arguments, and the names of ``open`` ones."""

    proven: dict
    usual: dict = field(default_factory=dict)
    open: tuple[str, ...] = ()


def infer(stage: str, layout: str, shapes: Shapes, title: str) -> Inferred:
    """Infer the arguments of one model; ``title`` names the file in messages.

    Raises:
        CheckpointError: a tensor that every model of this kind has is missing, or a block is of no known kind.
    """
    reader = _Reader(shapes, title)
    return _INFER[stage](reader, layout) if stage in _INFER else Inferred({})


class _Reader:
    """Shapes by name, with one message for what is missing or odd."""

    def __init__(self, shapes: Shapes, title: str):
        self.shapes = shapes
        self.title = title

    def size(self, name: str, dimension: int) -> int:
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.title} has no tensor '{name}', which every model of this kind has: "
                "the file is incomplete, download or save it again."
            )
        if dimension >= len(shape):
            raise CheckpointError(
                f"{self.title} has the tensor '{name}' with shape {list(shape)}, which fits no known block "
                f"(expected at least {dimension + 1} dimensions): choose a Stable Cascade file."
            )
        return shape[dimension]

    def count(self, pattern: str) -> int:
        """How many consecutive numbers fill the one group of ``pattern``, from 0 on."""
        compiled = re.compile(pattern)
        numbers = {int(match[1]) for name in self.shapes if (match := compiled.match(name))}
        count = 0
        while count in numbers:
            count += 1
        return count


# Stages B and C ------------------------------------------------------------------------------------------------


def _network(reader: _Reader) -> tuple[dict, dict, tuple[str, ...]]:
    """What Stages B and C share: levels, blocks, widths, heads, kernels, timestep conditions."""
    kinds = _block_kinds(reader)
    levels = reader.count(r"down_blocks\.(\d+)\.")
    level_config: list[str] = []
    down: list[int] = []
    up: list[int] = []
    widths: list[int] = []
    for level in range(levels):
        deep_first = levels - 1 - level
        pattern = _pattern(reader, level, kinds.get(("down", level), ""), kinds.get(("up", deep_first), ""))
        level_config.append(pattern)
        down.append(len(kinds[("down", level)]) // len(pattern))
        up.insert(0, len(kinds[("up", deep_first)]) // len(pattern))
        widths.append(_width(reader, level, kinds[("down", level)]))
    repeats = [
        [1 + reader.count(rf"{way}_repeat_mappers\.{level}\.(\d+)\.weight") for level in range(levels)]
        for way in ("down", "up")
    ]
    attended = [(width, "A" in pattern) for width, pattern in zip(widths, level_config, strict=True)]
    proven = {"c_hidden": widths, "blocks": [down, up], "block_repeat": repeats, "level_config": level_config}
    proven.update(_timesteps(reader, kinds))
    first = _first(kinds, "C")
    if first:
        proven["kernel_size"] = reader.size(f"{first}.depthwise.weight", 2)
    usual: dict = {"self_attn": True}
    if any(has_attention and width % HEAD_WIDTH for width, has_attention in attended):
        return proven, usual, ("nhead",)
    usual["nhead"] = [width // HEAD_WIDTH if has_attention else -1 for width, has_attention in attended]
    return proven, usual, ()


def _block_kinds(reader: _Reader) -> dict[tuple[str, int], str]:
    """(way, level) -> one letter per block: C convolution, T timestep, A attention, F feed-forward."""
    leaves: dict[tuple[str, int, int], set[str]] = {}
    for name in reader.shapes:
        if match := _BLOCK.match(name):
            leaves.setdefault((match[1], int(match[2]), int(match[3])), set()).add(match[4])
    kinds: dict[tuple[str, int], str] = {}
    for (way, level, index), names in sorted(leaves.items()):
        heads = {name.split(".")[0] for name in names}
        if heads <= {"attention", "kv_mapper"}:
            kind = "A"
        elif all(head.startswith("mapper") for head in heads):
            kind = "T"
        elif heads == {"channelwise"}:
            kind = "F"
        elif heads <= {"depthwise", "channelwise"}:
            kind = "C"
        else:
            raise CheckpointError(
                f"{reader.title} has in '{way}_blocks.{level}.{index}' the tensors {', '.join(sorted(names)[:4])}, "
                "which fit no known block (convolution, timestep, attention, feed-forward): choose another file."
            )
        if index != len(kinds.get((way, level), "")):
            raise CheckpointError(
                f"{reader.title} has the block '{way}_blocks.{level}.{index}' and lacks "
                f"'{way}_blocks.{level}.{len(kinds.get((way, level), ''))}' before it: "
                "the file is incomplete, download or save it again."
            )
        kinds[(way, level)] = kinds.get((way, level), "") + kind
    return kinds


def _pattern(reader: _Reader, level: int, down: str, up: str) -> str:
    """The shortest run of block kinds whose repetition gives both halves of a level."""
    for length in range(1, min(len(down), len(up)) + 1):
        pattern = down[:length]
        if all(len(half) % length == 0 and pattern * (len(half) // length) == half for half in (down, up)):
            return pattern
    raise CheckpointError(
        f"{reader.title} has at level {level} the blocks {down or 'none'} on the way down and {up or 'none'} on the "
        "way up, expected one pattern such as CTA repeated on both: the file is incomplete or not Stable Cascade."
    )


def _width(reader: _Reader, level: int, kinds: str) -> int:
    for index, kind in enumerate(kinds):
        block = f"down_blocks.{level}.{index}"
        if kind in "CF":
            return reader.size(f"{block}.channelwise.4.weight", 0)
        if kind == "T":
            return reader.size(f"{block}.mapper.weight", 0) // 2
        return reader.size(f"{block}.kv_mapper.1.weight", 0)
    raise AssertionError("a level without blocks has no pattern")


def _first(kinds: Mapping[tuple[str, int], str], letter: str) -> str | None:
    for (way, level), sequence in sorted(kinds.items()):
        if letter in sequence:
            return f"{way}_blocks.{level}.{sequence.index(letter)}"
    return None


def _timesteps(reader: _Reader, kinds: Mapping[tuple[str, int], str]) -> dict:
    block = _first(kinds, "T")
    if block is None:
        return {}
    start = f"{block}.mapper_"
    found = {name[len(start) :].split(".")[0] for name in reader.shapes if name.startswith(start)}
    order = {"sca": 0, "crp": 1}
    return {
        "c_r": reader.size(f"{block}.mapper.weight", 1),
        "t_conds": sorted(found, key=lambda cond: (order.get(cond, 2), cond)),
    }


def _patched(reader: _Reader, patch_size: int) -> dict:
    """Channels in and out: shapes give channels times patch area, so the stage's usual patch is taken where it fits."""
    channels_in, channels_out = reader.size("embedding.1.weight", 1), reader.size("clf.1.weight", 0)
    area = patch_size**2
    if channels_in % area or channels_out % area:
        patch_size, area = 1, 1
    return {"c_in": channels_in // area, "c_out": channels_out // area, "patch_size": patch_size}


def _stage_c(reader: _Reader, layout: str) -> Inferred:
    c_cond = reader.size("clip_txt_mapper.weight", 0)
    proven, usual, unknown = _network(reader)
    levels = len(proven["c_hidden"])
    proven |= {
        "c_cond": c_cond,
        "c_clip_text": reader.size("clip_txt_mapper.weight", 1),
        "c_clip_text_pooled": reader.size("clip_txt_pooled_mapper.weight", 1),
        "c_clip_img": reader.size("clip_img_mapper.weight", 1),
        "c_clip_seq": reader.size("clip_txt_pooled_mapper.weight", 0) // c_cond,
    }
    usual |= _patched(reader, 1) | {"dropout": [0.1] * levels, "switch_level": [False] * (levels - 1)}
    return Inferred(proven, usual, unknown)


def _stage_b(reader: _Reader, layout: str) -> Inferred:
    proven, usual, unknown = _network(reader)
    tokens = reader.size("clip_mapper.weight", 0)
    proven |= {
        "c_clip": reader.size("clip_mapper.weight", 1),
        "c_effnet": reader.size("effnet_mapper.0.weight", 1),
        "c_pixels": reader.size("pixels_mapper.0.weight", 1),
    }
    attention = next((name for name in reader.shapes if name.endswith(".kv_mapper.1.weight")), None)
    if attention:
        c_cond = reader.size(attention, 1)
        proven |= {"c_cond": c_cond, "c_clip_seq": tokens // c_cond}
    else:
        usual |= {"c_cond": tokens // 4, "c_clip_seq": 4}
    dropout = [0.1 if "A" in pattern else 0.0 for pattern in proven["level_config"]]
    return Inferred(proven, usual | _patched(reader, 2) | {"dropout": dropout}, unknown)


# The small models ----------------------------------------------------------------------------------------------


def _stage_a(reader: _Reader, layout: str) -> Inferred:
    strided = [name for name in reader.shapes if re.match(r"^down_blocks\.\d+\.weight$", name)]
    mixing = 0
    while f"up_blocks.{mixing + 1}.gammas" in reader.shapes:  # up_blocks.0 is the convolution from the latent
        mixing += 1
    proven = {
        "levels": len(strided) + 1,
        "bottleneck_blocks": mixing,
        "c_hidden": reader.size("up_blocks.0.0.weight", 0),
        "c_latent": reader.size("up_blocks.0.0.weight", 1),
        "codebook_size": reader.size("vquantizer.codebook.weight", 0),
    }
    return Inferred(proven, {"scale_factor": DIFFUSERS_SCALE_FACTOR if layout == "diffusers" else SCALE_FACTOR})


def _efficientnet(reader: _Reader) -> dict:
    """Widths (stem, groups, head) and depths of an EfficientNetV2 under ``backbone``."""
    groups = 0
    while f"backbone.{groups + 1}.0.block.0.0.weight" in reader.shapes:
        groups += 1
    widths, depths = [reader.size("backbone.0.0.weight", 0)], []
    for group in range(1, groups + 1):
        depths.append(reader.count(rf"backbone\.{group}\.(\d+)\.block\.0\.0\.weight"))
        last = max(reader.count(rf"backbone\.{group}\.0\.block\.(\d+)\.") - 1, 0)
        widths.append(reader.size(f"backbone.{group}.0.block.{last}.0.weight", 0))
    widths.append(reader.size(f"backbone.{groups + 1}.0.weight", 0))
    return {"widths": widths, "depths": depths}


def _latent_encoder(reader: _Reader, layout: str) -> Inferred:
    return Inferred({"c_latent": reader.size("mapper.0.weight", 0), **_efficientnet(reader)})


def _previewer(reader: _Reader, layout: str) -> Inferred:
    proven = {
        "c_in": reader.size("blocks.0.weight", 1),
        "c_hidden": reader.size("blocks.0.weight", 0),
        "c_out": reader.size("blocks.24.weight", 0),
    }
    return Inferred(proven)


def _controlnet(reader: _Reader, layout: str) -> Inferred:
    projections = reader.count(r"projections\.(\d+)\.0\.weight")
    proven: dict = {"c_proj": reader.size("projections.0.2.weight", 0)}
    if "backbone.0.0.weight" in reader.shapes:
        proven |= {"bottleneck_mode": "effnet", "c_in": reader.size("backbone.0.0.weight", 1), **_efficientnet(reader)}
    else:
        # The simple one is two 3x3 convolutions, the large one begins and ends with 1x1 ones.
        large = reader.size("backbone.0.weight", 3) == 1
        proven |= {"bottleneck_mode": "large" if large else "simple", "c_in": reader.size("backbone.0.weight", 1)}
        if large:
            proven |= _large_bottleneck(reader)
    if projections == len(PUBLISHED_PROJ_BLOCKS):
        return Inferred(proven, {"proj_blocks": list(PUBLISHED_PROJ_BLOCKS)})
    if proven["bottleneck_mode"] == "simple":  # the reference's identity configuration steers every block
        return Inferred(proven, {"proj_blocks": list(range(projections))})
    return Inferred(proven, {}, ("proj_blocks",))


def control_of(config: Mapping) -> dict:
    """The kind of control that a ControlNet with these arguments reads, as far as the published ones tell."""
    mode, c_in = config["bottleneck_mode"] or "effnet", config["c_in"]
    if mode == "effnet":
        kind = "canny" if c_in == 1 else "inpainting" if c_in == 4 else None
    else:
        kind = "super_resolution" if mode == "large" else "identity"
    return {"kind": kind} if kind else {}


def _large_bottleneck(reader: _Reader) -> dict:
    """Widths and number of blocks, where they are not the published ones."""
    blocks = 0
    while f"backbone.{blocks + 3}.blocks.0.weight" in reader.shapes:
        blocks += 1
    layers = ("backbone.0.weight", "backbone.2.weight", f"backbone.{blocks + 3}.weight")
    widths = [reader.size(name, 0) for name in layers]
    if (tuple(widths), blocks) == (LARGE_WIDTHS, LARGE_BLOCKS):
        return {}
    return {"large_widths": widths, "large_blocks": blocks}


def _ip_adapter(reader: _Reader, layout: str) -> Inferred:
    c_cond = max(1, reader.size("image_proj.norm.weight", 0))
    blocks = reader.count(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
    proven = {
        "c_image": reader.size("image_proj.proj.weight", 1),
        "c_cond": c_cond,
        "c_hidden_per_block": [reader.size(f"ip_adapter.{block}.to_k_ip.weight", 0) for block in range(blocks)],
        "tokens": reader.size("image_proj.proj.weight", 0) // c_cond,
    }
    return Inferred(proven)


# CLIP ----------------------------------------------------------------------------------------------------------


def _clip_tower(reader: _Reader, tower: str, projection: str) -> dict:
    layer = f"{tower}.encoder.layers.0.mlp.fc1.weight"
    return {
        "hidden_size": reader.size(layer, 1),
        "intermediate_size": reader.size(layer, 0),
        "num_hidden_layers": reader.count(rf"{tower}\.encoder\.layers\.(\d+)\.mlp\.fc1\.weight"),
        "projection_dim": reader.size(f"{projection}.weight", 0),
    }


def _clip_usual(proven: dict, openai_widths: tuple[int, ...]) -> tuple[dict, tuple[str, ...]]:
    # OpenAI's own models use the quick GELU, OpenCLIP's (bigG among them) the exact one.
    usual: dict = {"hidden_act": "quick_gelu" if proven["hidden_size"] in openai_widths else "gelu"}
    if proven["hidden_size"] % HEAD_WIDTH:
        return usual, ("num_attention_heads",)
    return usual | {"num_attention_heads": proven["hidden_size"] // HEAD_WIDTH}, ()


def _text_encoder(reader: _Reader, layout: str) -> Inferred:
    proven = _clip_tower(reader, "text_model", "text_projection")
    # A file that stores only the rows that its captions use lists them in `token_rows`; the rest is spread on loading.
    rows = reader.size("text_model.embeddings.token_embedding.weight", 0)
    proven["vocab_size"] = CLIP_VOCABULARY if "token_rows" in reader.shapes else rows
    proven["max_position_embeddings"] = reader.size("text_model.embeddings.position_embedding.weight", 0)
    return Inferred(proven, *_clip_usual(proven, (512, 768)))


def _image_encoder(reader: _Reader, layout: str) -> Inferred:
    proven = _clip_tower(reader, "vision_model", "visual_projection")
    patch = reader.size("vision_model.embeddings.patch_embedding.weight", 2)
    patches = reader.size("vision_model.embeddings.position_embedding.weight", 0) - 1
    proven |= {"patch_size": patch, "image_size": round(patches**0.5) * patch}
    return Inferred(proven, *_clip_usual(proven, (768, 1024)))


_INFER: dict[str, Callable[[_Reader, str], Inferred]] = {
    "stage_a": _stage_a,
    "stage_b": _stage_b,
    "stage_c": _stage_c,
    "latent_encoder": _latent_encoder,
    "previewer": _previewer,
    "controlnet": _controlnet,
    "ip_adapter": _ip_adapter,
    "text_encoder": _text_encoder,
    "image_encoder": _image_encoder,
}
