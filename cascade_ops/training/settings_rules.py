"""Which values a run's settings may have, and which of them belong together."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any, NamedTuple

from . import settings as known
from .settings import Settings

CHOICES: dict[str, tuple[str, ...]] = {
    "target": known.TARGETS,
    "precision": known.PRECISIONS,
    "data.sources.kind": known.SOURCE_KINDS,
    "data.crop": ("centre", "random"),
    "optimizer.name": known.OPTIMIZERS,
    "optimizer.schedule": known.SCHEDULES,
    "loss.weight": known.LOSS_WEIGHTS,
    "lora.dialects": known.LORA_DIALECTS,
    "controlnet.kind": known.CONTROL_KINDS,
    "samples.chain": known.CHAINS,
}


class Range(NamedTuple):
    """Numbers from `low` to `high`; without the ends that are open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: Any) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.low_open else f"{self.low:g} or more"
        if self.high == math.inf:
            return low
        if self.low_open or self.high_open:
            return f"{low} and {'less than' if self.high_open else 'at most'} {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


_COUNT, _FROM_ZERO, _POSITIVE = Range(1), Range(0), Range(0, low_open=True)
_SHARE, _SEED = Range(0, 1), Range(0, 2**63 - 1)
_DECAY, _PART = Range(0, 1, high_open=True), Range(0, 1, low_open=True)

RANGES: dict[str, Range] = {
    "steps": _COUNT,
    "batch_size": _COUNT,
    "seed": _SEED,
    "save_every": _FROM_ZERO,
    "log_every": _COUNT,
    "data.sources.repeats": _COUNT,
    "data.sources.loss_weight": _POSITIVE,
    "data.resolution": Range(64),
    "data.buckets": Range(1 / 8, 8),
    "data.caption_dropout": _SHARE,
    "data.image_embedding_dropout": _SHARE,
    "data.workers": _FROM_ZERO,
    "prior.pictures": _COUNT,
    "prior.loss_weight": _POSITIVE,
    "prior.share": Range(0, 1, True, True),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup": _FROM_ZERO,
    "optimizer.weight_decay": _FROM_ZERO,
    "optimizer.beta1": _DECAY,
    "optimizer.beta2": _DECAY,
    "optimizer.grad_clip": _FROM_ZERO,
    "optimizer.accumulation": _COUNT,
    "optimizer.ema": _DECAY,
    "encoders.crop": _FROM_ZERO,
    "encoders.noise": _FROM_ZERO,
    "encoders.frozen_from": _SHARE,
    "encoders.maps": Range(2),
    "encoders.fitted_on": _COUNT,
    "loss.buckets": Range(2),
    "loss.shift": _POSITIVE,
    "loss.offset_noise": _SHARE,
    "loss.condition_noise": _SHARE,
    "loss.latent_dropout": _SHARE,
    "loss.rescale": _PART,
    "loss.pyramid_share": _PART,
    "loss.weight_limit": Range(1),
    "lora.rank": _COUNT,
    "lora.alpha": _POSITIVE,
    "lcm.steps": _COUNT,
    "lcm.teacher_steps": _FROM_ZERO,
    "lcm.guidance": _FROM_ZERO,
    "lcm.shift": _FROM_ZERO,
    "ip_adapter.tokens": _COUNT,
    "ip_adapter.dropout": _SHARE,
    "tokens.vectors": _COUNT,
    "samples.every": _FROM_ZERO,
    "samples.seed": _SEED,
    "samples.steps": _COUNT,
}

# Settings that name a file or a folder; relative ones are taken from where the settings are written.
PATHS = {
    "output",
    "data.sources.path",
    "data.cache_folder",
    "controlnet.embeddings",
    "samples.pictures",
    *(f"models.{name}" for name in known.Models.__dataclass_fields__),
}
NO_PATHS = ("", "auto", "none")

_DENOISING_C = ("stage_c", "lora", "textual_inversion", "controlnet", "ip_adapter")
_THROUGH_STAGE_C = (*_DENOISING_C, "lcm")
_DIFFUSION = (*_THROUGH_STAGE_C, "stage_b")
# Stage B may be trained together with the latent encoder.
_WITH_STAGE_B = ("stage_b", "latent_encoder")
_CLIP = ("text_encoder", "image_encoder")

# A setting or a group of them -> the targets that it changes something for. What is not listed changes all.
HAS_EFFECT: dict[str, tuple[str, ...]] = {
    "network": ("stage_c", "stage_b", "stage_a", "latent_encoder", *_CLIP, "controlnet"),
    "gradient_checkpointing": _DIFFUSION,
    "models.stage_c": ("lora", "textual_inversion", "lcm", "controlnet", "ip_adapter"),
    "models.stage_b": (*_THROUGH_STAGE_C, "latent_encoder"),
    "models.stage_a": (*_DIFFUSION, "latent_encoder"),
    "models.latent_encoder": _DIFFUSION,
    "models.previewer": (*_THROUGH_STAGE_C, "latent_encoder"),
    "models.text_encoder": (*_DIFFUSION, "latent_encoder", "image_encoder"),
    "models.image_encoder": _THROUGH_STAGE_C,
    "data.caption_dropout": (*_DIFFUSION, "latent_encoder"),
    "data.image_embedding_dropout": ("stage_c", "lora", "textual_inversion", "lcm", "controlnet"),
    "prior": ("stage_c", "lora", "textual_inversion"),
    "loss": (*_DENOISING_C, *_WITH_STAGE_B),
    "loss.pyramid_noise": _WITH_STAGE_B,
    "loss.condition_noise": _WITH_STAGE_B,
    "loss.latent_dropout": _WITH_STAGE_B,
    "loss.rescale": ("stage_b",),
    "loss.pyramid_share": _WITH_STAGE_B,
    "lora": ("lora", "lcm"),
    "lcm": ("lcm",),
    "tokens": ("lora", "textual_inversion"),
    "controlnet": ("controlnet",),
    "ip_adapter": ("ip_adapter",),
    "samples": _THROUGH_STAGE_C,
    "samples.pictures": ("controlnet", "ip_adapter"),
    "samples.steps": _DENOISING_C,
    "encoders": ("stage_a", "latent_encoder", *_CLIP),
    "encoders.crop": ("stage_a",),
    "encoders.noise": ("stage_a", "latent_encoder"),
    "encoders.frozen_from": ("latent_encoder",),
    "encoders.previewer": ("latent_encoder",),
    "encoders.maps": ("latent_encoder",),
    "encoders.with_stage_b": ("latent_encoder",),
    "encoders.attributes": _CLIP,
    "encoders.token_attributes": ("text_encoder",),
    "encoders.fitted_on": ("stage_a", "latent_encoder"),
}


def rule_problems(settings: Settings, written: Set[str]) -> list[str]:
    """Sentences about settings that do not go together; `written` are the dotted names that the file has."""
    return [*_without_effect(settings.target, written), *_contradictions(settings, written)]


def _without_effect(target: str, written: Set[str]) -> list[str]:
    problems, groups = [], []
    for name, targets in HAS_EFFECT.items():
        if target in targets or any(name.startswith(f"{group}.") for group in groups):
            continue
        if any(path == name or path.startswith(f"{name}.") for path in written):
            groups.append(name)
            one = "target" if len(targets) == 1 else "targets"
            advice = "write it as `models.init`" if name == f"models.{target}" else "remove it"
            problems.append(
                f"`{name}` has no effect on the target {target}, it is for the {one} {', '.join(targets)}: {advice}."
            )
    return problems


def _contradictions(settings: Settings, written: Set[str]) -> list[str]:
    target, data, samples = settings.target, settings.data, settings.samples
    has_init = settings.models.init != "none"
    problems = []

    def wrong(condition: bool, sentence: str) -> None:
        if condition:
            problems.append(sentence)

    def has(*names: str) -> str:
        """The first of the names that is written, or that begins a written one."""
        return next((name for name in names if any(f"{path}.".startswith(f"{name}.") for path in written)), "")

    wrong(not data.sources, "`data.sources` is empty, expected at least one folder: write `- path: FOLDER` below it.")
    wrong(
        bool({"/", "\\"} & set(settings.name)) or settings.name in (".", ".."),
        f"`name` is {settings.name!r}, expected a file name without folders: `output` is for the folder.",
    )
    wrong(
        has_init and bool(settings.network) and target not in ("stage_c", "stage_b"),
        "`network` and `models.init` are both given, and the file already says what its network is: remove one.",
    )
    example = {"stage_c": "1B lite", "stage_b": "700M lite"}.get(target)
    wrong(
        example is not None and not has_init and not settings.network,
        f"Neither `models.init` nor `network` is given for {target}, expected one: name the file to fine-tune, or what "
        f'to train from scratch, such as {{size: "{example}"}}.',
    )
    prior = sorted(path for path in written if path.startswith("prior.") and path != "prior.caption")
    wrong(
        bool(prior) and not settings.prior.caption,
        f"`{''.join(prior[:1])}` has no effect without `prior.caption`: name the class, such as 'a dog', or remove it.",
    )
    wrong(
        target == "textual_inversion" and not settings.tokens,
        '`tokens` is empty, expected what textual inversion shall learn: write `- token: "[name]"` below it.',
    )
    names = [token.token for token in settings.tokens]
    wrong(len(set(names)) < len(names), "`tokens` names a token twice, expected each once: remove one of them.")
    identity = settings.controlnet.kind == "identity"
    wrong(
        target == "controlnet" and identity and not settings.controlnet.embeddings,
        "`controlnet.embeddings` is missing, expected for the kind identity: name the file of face embeddings.",
    )
    wrong(
        target == "controlnet" and bool(settings.controlnet.embeddings) and not identity,
        f"`controlnet.embeddings` has no effect on the kind {settings.controlnet.kind}: remove it.",
    )
    of_stage_b = has("loss", "models.stage_b", "models.stage_a", "models.text_encoder", "data.caption_dropout")
    wrong(
        target == "latent_encoder" and bool(of_stage_b) and not settings.encoders.with_stage_b,
        f"`{of_stage_b}` has no effect without Stage B: remove it, or set `encoders.with_stage_b` to true.",
    )
    wrong(
        target == "text_encoder" and not (settings.encoders.attributes and settings.encoders.token_attributes),
        "`encoders.attributes` or `encoders.token_attributes` is empty, expected the number of classes of each: a text "
        "encoder learns to tell what the data's attributes say.",
    )
    bucketed = has("loss.buckets", "loss.interpolate", "loss.weight_limit")
    wrong(
        bool(bucketed) and settings.loss.weight != "adaptive",
        f"`{bucketed}` is of the adaptive weight and has no effect on {settings.loss.weight}: remove it.",
    )
    wrong(
        bool(has("loss.weight_limit")) and settings.loss.weight == "adaptive" and not settings.loss.interpolate,
        "`loss.weight_limit` has no effect without interpolated buckets: remove it, or set `loss.interpolate` to true.",
    )
    wrong(
        target == "stage_b"
        and bool(settings.loss.offset_noise)
        and settings.loss.pyramid_noise
        and settings.loss.pyramid_share == 1,
        "`loss.offset_noise` has no effect beside pyramid noise: remove it, or set `loss.pyramid_noise` to false.",
    )
    wrong(
        bool(has("loss.pyramid_share")) and not settings.loss.pyramid_noise,
        "`loss.pyramid_share` has no effect without pyramid noise: remove it, or set `loss.pyramid_noise` to true.",
    )
    betas = has("optimizer.beta1", "optimizer.beta2")
    wrong(
        bool(betas) and settings.optimizer.name == "adafactor",
        f"`{betas}` has no effect on adafactor, it is of adamw: remove it.",
    )
    wrong(
        not data.cache and bool(data.cache_folder),
        "`data.cache_folder` has no effect since `data.cache` is off: remove it, or switch the cache on.",
    )
    others = sorted(path for path in written if path.startswith("samples.") and path != "samples.every")
    wrong(
        bool(others) and not samples.every,
        f"`{''.join(others[:1])}` has no effect since `samples.every` is 0: say every how many steps to sample.",
    )
    wrong(
        bool(samples.every) and not samples.prompts,
        "`samples.prompts` is empty, expected at least one prompt to sample: write one, or set `samples.every` to 0.",
    )
    wrong(
        bool(samples.every) and target == "controlnet" and identity,
        "`samples` has no effect on the kind identity, whose faces have no picture: remove it.",
    )
    needs_pictures = bool(samples.every) and target in ("controlnet", "ip_adapter") and not identity
    wrong(
        needs_pictures and len(samples.pictures) not in {1, len(samples.prompts)},
        f"`samples.pictures` has {len(samples.pictures)} entries for {len(samples.prompts)} prompts, expected one for "
        "all or one each: name the picture that steers each prompt.",
    )
    wrong(
        target == "controlnet" and identity and data.crop != "centre",
        "`data.crop` is random, expected centre for the kind identity: the faces' boxes are of whole pictures.",
    )
    return problems
