"""What a run will take, before it starts: weights, gradients, optimiser state, activations. Nothing is loaded.

    python -m stable_cascade_nodes.cascade_ops.training.estimate

prints the table of the published sizes that is in ``docs/training.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints import FileInfo, inspect_file
from ..checkpoints.releases import SAMPLING_DEFAULTS
from ..handles import StageHandle
from ..models.layers import AttnBlock, FeedForwardBlock, ResBlock
from ..text import TextEncoder
from . import targets
from .activations import Kept, StayingThere, kept_by
from .data.buckets import Bucket, make_buckets
from .draws import Draws
from .networks import SIZES, empty_network
from .objective import Batch, Objective
from .parts import Parts
from .settings import PRECISIONS, ControlNetSettings, Data, Loss, Optimizer, Settings
from .targets.controlnet import ControlNetObjective

# Targets whose step can run without numbers; those of the small encoders decide by what is in a batch.
_COUNTED = ("stage_c", "stage_b", "lora", "textual_inversion", "lcm", "controlnet", "ip_adapter")
_OWN_NETWORK = ("stage_c", "stage_b", "stage_a", "latent_encoder", "text_encoder", "image_encoder")
_FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """What a run takes on each device, in weights and bytes.

    trained, tensors: weights and tensors that are trained. frozen: weights that a step reads beside them. weights:
    bytes of both. gradients, optimizer, average: bytes. activations: bytes kept for the way back by `batch` pictures of
    `size` (width, height); None where that is not estimated. samples: seen by a whole run of `steps`.
    """

    target: str
    trained: int
    tensors: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int | None
    batch: int
    size: tuple[int, int]
    steps: int
    samples: int

    @property
    def peak(self) -> int:
        """Bytes of all that together: at the worst moment, when the way back begins, most of it is there."""
        return self.weights + self.gradients + self.optimizer + self.average + (self.activations or 0)

    def describe(self) -> str:
        """A few lines for a person."""
        each = f"{self.batch} picture{'s' if self.batch > 1 else ''} of {self.size[0]} x {self.size[1]}"
        rows = [
            ("trained", f"{self.trained:,} weights in {self.tensors:,} tensors"),
            ("frozen", f"{self.frozen:,} weights"),
            ("weights", as_bytes(self.weights)),
            ("gradients", as_bytes(self.gradients)),
            ("optimizer", as_bytes(self.optimizer)),
        ]
        if self.average:
            rows.append(("average", as_bytes(self.average)))
        if self.activations is None:
            rows += [("activations", "not estimated for this target"), ("memory", f"{as_bytes(self.peak)} and these")]
        else:
            rows += [
                ("activations", f"about {as_bytes(self.activations)} for {each}"),
                ("memory", f"about {as_bytes(self.peak)} at most, on each device"),
            ]
        rows.append(("run", f"{self.steps:,} steps, {self.samples:,} samples"))
        return "\n".join([f"training {self.target}", *(f"  {name:<12} {text}" for name, text in rows)])


def estimate(settings: Settings, published: Mapping[str, str] | None = None) -> Estimate:
    """Estimate a run on as many processes as there are.

    published: sizes of stages (``{"stage_c": "1B lite"}``) to take instead of files; stages that are not named and have
    a published size have the largest.

    Raises:
        ValueError: settings or model files that do not fit; only headers are read.
    """
    return _reckon(settings, _measure(settings, published))


class _Measured(NamedTuple):
    """trained, frozen: weights on the meta device. kept: by a step, None where that cannot be said."""

    trained: list[nn.Parameter]
    frozen: list[nn.Parameter]
    kept: Kept | None
    bucket: Bucket


def _measure(settings: Settings, published: Mapping[str, str] | None) -> _Measured:
    """Build what is trained without memory, and run a step of it."""
    parts = _EmptyParts(settings, published)
    # Building a network draws random numbers, which are not this function's to use up.
    with torch.random.fork_rng([]), torch.device("meta"), StayingThere():
        objective = targets.build(_without_init(settings), parts).to("meta").train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    bucket = max(make_buckets(settings.data.resolution, settings.data.buckets), key=lambda b: b.width * b.height)
    if settings.target not in _COUNTED:
        return _Measured(trained, [p for p in objective.parameters() if not p.requires_grad], None, bucket)
    batch = _batch(objective, parts, settings, bucket)
    if isinstance(objective, ControlNetObjective):
        _skip_control(objective, settings.batch_size, bucket)
    draws = Draws(0, 0, range(settings.batch_size))
    autocast = settings.precision == "bfloat16"
    with torch.random.fork_rng([]):
        kept = kept_by(lambda: objective(batch, draws), _blocks(objective), autocast, trained)
    return _Measured(trained, kept.frozen, kept, bucket)


def _reckon(settings: Settings, measured: _Measured) -> Estimate:
    trained, frozen, kept, bucket = measured
    activations = None
    if kept is not None:
        activations = kept.checkpointed if settings.gradient_checkpointing else kept.plain
    weights = sum(parameter.numel() for parameter in trained)
    seen = settings.batch_size * settings.optimizer.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    return Estimate(
        target=settings.target,
        trained=weights,
        tensors=len(trained),
        frozen=sum(parameter.numel() for parameter in frozen),
        weights=sum(tensor.numel() * tensor.element_size() for tensor in (*trained, *frozen)),
        gradients=weights * _FLOAT,
        optimizer=sum(optimizer_bytes(tuple(p.shape), settings.optimizer.name) for p in trained),
        average=weights * _FLOAT if settings.optimizer.ema else 0,
        activations=activations,
        batch=settings.batch_size,
        size=(bucket.width, bucket.height),
        steps=settings.steps,
        samples=settings.steps * seen,
    )


def optimizer_bytes(shape: tuple[int, ...], name: str) -> int:
    """Bytes that the optimiser `name` keeps for a float32 weight of this shape."""
    count, step = prod(shape), _FLOAT
    if name == "adamw":
        return step + 2 * count * _FLOAT
    if name == "adafactor":
        if len(shape) < 2:
            return step + count * _FLOAT
        return step + (count // shape[-1] + count // shape[-2]) * _FLOAT
    # bitsandbytes leaves tensors below 4096 numbers as they are, and scales each block of 256.
    if count < 4096:
        return 2 * count * _FLOAT
    return 2 * (count + -(-count // 256) * _FLOAT)


def as_bytes(count: float) -> str:
    """``3.3 GB``, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


class _EmptyParts(Parts):
    """Parts whose models are on the meta device, from the headers of their files or of published sizes."""

    def __init__(self, settings: Settings, published: Mapping[str, str] | None):
        super().__init__(settings.models, frozen_dtype=settings.precision)
        self._published = published
        self._made: dict[tuple[str, bool], StageHandle] = {}

    def load(self, stage: str, *, trained: bool = False) -> StageHandle:
        if (stage, trained) not in self._made:
            self._made[stage, trained] = self._make(stage, trained)
        return self._made[stage, trained]

    def _make(self, stage: str, trained: bool) -> StageHandle:
        if self._published is None:
            info = inspect_file(self.path(stage)).component(stage)
        else:
            info = _published_info(stage, self._published.get(stage))
        dtype = torch.float32 if trained else getattr(torch, self.dtype_of(stage))
        module: Any = empty_network(stage, info.config).to(dtype)
        module = module.eval().requires_grad_(False)
        if stage == "text_encoder":
            module = TextEncoder(module)
        return StageHandle(stage, module, replace(info, recipes={}), info.path.name)


def _blocks(objective: Objective) -> list[nn.Module]:
    """All blocks that gradient checkpointing would run again, in trained and in frozen modules."""
    blocks: dict[int, nn.Module] = {}
    for module in _modules(objective, set()):
        for part in module.modules():
            if isinstance(part, ResBlock | AttnBlock | FeedForwardBlock):
                blocks[id(part)] = part
    return list(blocks.values())


def _modules(thing: Any, seen: set[int]) -> Iterable[nn.Module]:
    """Modules in an objective's attributes; frozen ones lie in lists and in helpers, out of reach of `modules`."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        yield thing
    if isinstance(thing, list | tuple):
        for entry in thing:
            yield from _modules(entry, seen)
    elif isinstance(thing, Objective):
        for entry in vars(thing).values():
            yield from _modules(entry, seen)


def _skip_control(objective: ControlNetObjective, batch: int, bucket: Bucket) -> None:
    """Let the ControlNet read an empty control: finding edges takes numbers, and nothing of it is kept."""
    cells = 32 // objective.kind.compression
    size = bucket.latent_height * cells, bucket.latent_width * cells
    control = torch.empty(batch, objective.config["c_in"], *size, device="meta")
    objective.control = lambda *_: control  # type: ignore[method-assign]


def _without_init(settings: Settings) -> Settings:
    """The same run with a new network in the place of the file that it starts from, of the same size.

    Without gradient checkpointing, which is reckoned from where the blocks lie, and without a weight that learns.
    """
    settings = replace(settings, gradient_checkpointing=False, loss=replace(settings.loss, weight="constant"))
    init, target = settings.models.init, settings.target
    if init == "none":
        return settings
    settings = replace(settings, models=replace(settings.models, init="none"))
    if target not in (*_OWN_NETWORK, "controlnet"):
        return settings  # an adapter's size is in the settings
    config = dict(inspect_file(Path(init)).component(target).config)
    if target == "controlnet":
        config = {name: config[name] for name in ("proj_blocks", "widths", "depths") if name in config}
    return replace(settings, network={**config, **settings.network})


def _published_info(stage: str, size: str | None) -> FileInfo:
    clip = {
        "text_encoder": {
            "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
            "num_attention_heads": 20, "hidden_act": "gelu",
        },
        "image_encoder": {
            "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768, "num_hidden_layers": 24,
            "num_attention_heads": 16, "patch_size": 14,
        },
    }  # fmt: skip
    size = size or next(iter(SIZES.get(stage, {"": {}})))
    config = clip.get(stage) or SIZES.get(stage, {}).get(size, {})
    return FileInfo(
        Path(f"{stage}.safetensors"), stage, size, 0, "original", "", ("fp32",), 0, 0, 0, dict(config), (),
        SAMPLING_DEFAULTS.get(stage, {}),
    )  # fmt: skip


def _batch(objective: Objective, parts: Parts, settings: Settings, bucket: Bucket) -> Batch:
    """A batch of shapes, as the data would give them."""
    size = settings.batch_size
    # Captions name all tokens, without which these would take no part.
    caption = " ".join(["a picture", *(token.token for token in settings.tokens)])

    def empty(*shape: int) -> Tensor:
        return torch.empty(size, *shape, device="meta")

    batch: Batch = {"loss_weight": empty(), "name": ["picture"] * size, "caption": [caption] * size}
    if "image" in objective.needs:
        batch["image"] = empty(3, bucket.height, bucket.width)
    if "stage_c_latent" in objective.needs:
        batch["stage_c_latent"] = empty(16, bucket.latent_height, bucket.latent_width)
    if "stage_a_latent" in objective.needs:
        batch["stage_a_latent"] = empty(4, bucket.height // 4, bucket.width // 4)
    if {"text", "text_pooled"} & objective.needs:
        encoder = parts.load("text_encoder").module
        batch |= {"text": empty(encoder.length, encoder.width), "text_pooled": empty(1, encoder.pooled_width)}
    if "image_embedding" in objective.needs:
        width = parts.load("image_encoder").module.config.projection_dim
        batch["image_embedding"] = empty(1, width)
    return batch


# Row of the table -> settings that make it, and the size of the Stage C that an adapter is for.
_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "Stage C 3.6B": ({"target": "stage_c", "network": SIZES["stage_c"]["3.6B"]}, ""),
    "Stage C 1B lite": ({"target": "stage_c", "network": SIZES["stage_c"]["1B lite"]}, ""),
    "Stage B 1.5B": ({"target": "stage_b", "network": SIZES["stage_b"]["1.5B"]}, ""),
    "Stage B 700M lite": ({"target": "stage_b", "network": SIZES["stage_b"]["700M lite"]}, ""),
    "LoRA on 3.6B": ({"target": "lora"}, "3.6B"),
    "LoRA on 1B lite": ({"target": "lora"}, "1B lite"),
    "ControlNet canny or inpainting on 3.6B": ({"target": "controlnet"}, "3.6B"),
    "ControlNet super-resolution on 3.6B": (
        {"target": "controlnet", "controlnet": ControlNetSettings("super_resolution")},
        "3.6B",
    ),
    "IP-Adapter on 3.6B": ({"target": "ip_adapter"}, "3.6B"),
    "IP-Adapter on 1B lite": ({"target": "ip_adapter"}, "1B lite"),
}
# Column -> what it changes.
_COLUMNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, checkpointing": {"precision": "bfloat16", "gradient_checkpointing": True},
    "the same, adafactor": {
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "optimizer": Optimizer("adafactor"),
    },
}


def table_row(name: str) -> str:
    """A row of the table: memory in GB for one picture of 1024 x 1024 a batch."""
    changed, size = _ROWS[name]
    # Of Stage B's losses the leanest: Stage C latents come from the cache.
    settings = replace(Settings("stage_c", ""), data=Data(buckets=(1.0,)), loss=Loss(rescale=1.0), **changed)
    measured = {name: _measure(replace(settings, precision=name), {"stage_c": size}) for name in PRECISIONS}
    runs = [replace(settings, **column) for column in _COLUMNS.values()]
    found = [_reckon(run, measured[run.precision]) for run in runs]
    trained = found[0].trained / 1e6
    cells = [f"{trained:,.0f} M" if trained >= 100 else f"{trained:.1f} M", *(f"{e.peak / 1e9:.1f}" for e in found)]
    return f"| {name} | {' | '.join(cells)} |"


def table() -> str:
    """Memory of the published sizes, as a Markdown table."""
    head = ["", "trained", *_COLUMNS]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(table_row, _ROWS)])


if __name__ == "__main__":
    print(table())
