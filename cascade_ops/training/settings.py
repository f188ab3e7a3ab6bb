"""What a training run is: the settings that a configuration file gives, with the reference's values as defaults.

`settings_file` reads them from YAML or TOML; the nodes build them directly. Defaults are those of the training
configurations in Stability-AI/StableCascade where it has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TARGETS = (
    "stage_c",
    "stage_b",
    "stage_a",
    "latent_encoder",
    "text_encoder",
    "image_encoder",
    "lora",
    "textual_inversion",
    "lcm",
    "controlnet",
    "ip_adapter",
)
SOURCE_KINDS = ("folder", "webdataset", "huggingface")
OPTIMIZERS = ("adamw", "adafactor", "adamw8bit")
SCHEDULES = ("constant", "cosine", "linear")
LOSS_WEIGHTS = ("adaptive", "p2", "constant", "snr", "min_snr", "sech", "sigmoid", "debiased")
PRECISIONS = ("float32", "bfloat16")
CONTROL_KINDS = ("canny", "inpainting", "super_resolution", "identity")
LORA_DIALECTS = ("comfyui", "reference", "diffusers", "onetrainer")
CHAINS = ("preview", "full")


@dataclass(frozen=True)
class Models:
    """The files that a run starts from: a path, or ``auto`` for what lies in the model folders or is bundled.

    init: weights that the trained part itself starts from; ``none`` trains it from scratch with `Settings.network`.
    For an adapter it is an adapter file to go on with.
    """

    stage_c: str = "auto"
    stage_b: str = "auto"
    stage_a: str = "auto"
    latent_encoder: str = "auto"
    previewer: str = "auto"
    text_encoder: str = "auto"
    image_encoder: str = "auto"
    init: str = "none"


@dataclass(frozen=True)
class Source:
    """One set of pictures with captions.

    path: a folder, a tar or a folder of tars, or a Hugging Face dataset on disk. kind: one of SOURCE_KINDS.
    repeats: how often a pass over the data sees each picture. loss_weight: of its samples; prior preservation gives
    the class pictures their own. caption: replaces the captions of the files; empty keeps them.
    """

    path: str
    kind: str = "folder"
    repeats: int = 1
    loss_weight: float = 1.0
    caption: str = ""


@dataclass(frozen=True)
class Data:
    """What is trained on.

    resolution: side in pixels of a square picture; other shapes have about its area. buckets: aspect ratios
    (width / height) that pictures are sorted into; one number trains on that shape alone. caption_dropout: share of
    samples that see the empty prompt. image_embedding_dropout: share that sees no CLIP picture embedding; the
    reference keeps a tenth. cache: encode pictures and captions once and keep the results on disk.
    cache_folder: empty for ``cache`` in the run's folder. workers: processes that read pictures. crop: where to cut a
    picture to its bucket's shape, ``centre`` or ``random``.
    """

    sources: tuple[Source, ...] = ()
    resolution: int = 1024
    buckets: tuple[float, ...] = (1.0, 4 / 5, 3 / 4, 2 / 3, 9 / 16, 1 / 2, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)
    caption_dropout: float = 0.05
    image_embedding_dropout: float = 0.9
    cache: bool = True
    cache_folder: str = ""
    workers: int = 0
    crop: str = "centre"


@dataclass(frozen=True)
class Prior:
    """Prior preservation (Ruiz et al., "DreamBooth", 2022): what the base model makes of `caption` is trained on too.

    caption: the class, such as ``a dog``; empty switches it off. pictures: how many latents Stage C makes of it before
    training. loss_weight: of these samples. share: part of each batch.
    """

    caption: str = ""
    pictures: int = 100
    loss_weight: float = 1.0
    share: float = 0.5


@dataclass(frozen=True)
class Optimizer:
    """How weights change.

    name: ``adamw``; ``adafactor`` keeps a fraction of its state; ``adamw8bit`` (bitsandbytes, CUDA). schedule: after
    `warmup` steps. accumulation: batches per step. ema: decay of the weight average per step, 0 for none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0
    accumulation: int = 1
    ema: float = 0.0


@dataclass(frozen=True)
class Loss:
    """What a wrong prediction costs, and which noise is predicted.

    weight: one of LOSS_WEIGHTS. buckets, interpolate: of the adaptive weight; small batches want 24 and true. shift:
    of the schedule that noise levels are drawn from. offset_noise: share of noise that is one value per channel.
    pyramid_noise: Stage B's coarse noise; pyramid_share: of the samples that get it, the others see white noise.
    condition_noise: largest noise on Stage B's Stage C latents.
    latent_dropout: share of samples whose Stage C latent Stage B sees as zeros. rescale: Stage B sees Stage C latents
    made smaller by a random factor down to this, and back. weight_limit: largest interpolated adaptive weight; noise
    levels whose loss is below one part in this learn less than their share.
    """

    weight: str = "adaptive"
    buckets: int = 300
    interpolate: bool = False
    shift: float = 1.0
    offset_noise: float = 0.0
    pyramid_noise: bool = True
    condition_noise: float = 0.0
    latent_dropout: float = 0.1
    rescale: float = 0.5
    pyramid_share: float = 1.0
    weight_limit: float = 300.0


@dataclass(frozen=True)
class Token:
    """A learned token. token: ``[name]`` or ``<name>`` for a new one, or an existing word. init: what a new one starts
    as: one or more words whose mean it takes. vectors: how many places it takes in a prompt."""

    token: str
    init: str = ""
    vectors: int = 1


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al. 2021). modules: parts of Stage C's layer names that it reaches, ``.attn`` is all
    attention, an empty string everything. dora: also learn sizes, one per input of each weight (Liu et al. 2024).
    dialects: of LORA_DIALECTS; one file is written in each."""

    rank: int = 4
    alpha: float = 1.0
    dora: bool = False
    modules: tuple[str, ...] = (".attn",)
    dialects: tuple[str, ...] = ("comfyui",)


@dataclass(frozen=True)
class LCM:
    """What a LoRA for few steps is distilled for (Luo et al. 2023); its size is in `LoRA`.

    steps: of the lcm sampler. teacher_steps: of the model itself, with guidance, from each of these steps to the next;
    0 learns the guided answer at each of them alone. guidance: of the model itself; shift: of the schedule of both;
    0 is the model's own.
    """

    steps: int = 4
    teacher_steps: int = 5
    guidance: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True)
class ControlNetSettings:
    """kind: one of CONTROL_KINDS. embeddings: for identity, a file with face boxes and embeddings per picture."""

    kind: str = "canny"
    embeddings: str = ""


@dataclass(frozen=True)
class IPAdapterSettings:
    """tokens: how many image tokens the picture's embedding becomes. dropout: share of samples that see the text and no
    picture, and again as many that see neither; `Data.caption_dropout` is the share that sees the picture alone."""

    tokens: int = 4
    dropout: float = 0.05


@dataclass(frozen=True)
class Samples:
    """Pictures made while training. every: steps between them, 0 for none. chain: ``preview`` decodes Stage C with the
    previewer, ``full`` runs Stages B and A. pictures: control or reference pictures, one per prompt, where the target
    needs them."""

    every: int = 0
    prompts: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    chain: str = "preview"
    seed: int = 0
    steps: int = 20


@dataclass(frozen=True)
class Encoders:
    """Training Stage A, the latent encoder with its previewer, and the CLIP towers.

    crop: side in pixels of the random part of each picture that Stage A learns from, 0 for all of it. noise: on the
    latent while training; its deviation for Stage A, the largest one for the latent encoder. frozen_from: share of the
    run from which on the latent encoder's batch norms keep their statistics. previewer: constructor arguments of the
    previewer that is trained from scratch with the latent encoder. maps: number of classes, background included, of
    each class map of the data; without maps the latent encoder learns from pixels alone. with_stage_b:
    train Stage B (`Models.stage_b`) together with the latent encoder, on its latents. attributes: number of classes of
    each attribute of the data that the pooled text and the picture embedding must tell; token_attributes: of those
    that the token states must tell. fitted_on: last pictures of the run on which the scale of the latent, and Stage A's
    codebook, are fitted when files are written.
    """

    crop: int = 0
    noise: float = 0.03
    frozen_from: float = 0.6
    previewer: dict = field(default_factory=dict)
    maps: tuple[int, ...] = ()
    with_stage_b: bool = False
    attributes: dict = field(default_factory=dict)
    token_attributes: dict = field(default_factory=dict)
    fitted_on: int = 256


@dataclass(frozen=True)
class Settings:
    """A whole run.

    target: one of TARGETS. output: folder of the run: checkpoint, log, samples, and the finished files. network:
    constructor arguments of the trained part when it is trained from scratch, or ``{"size": "1B lite"}`` for a
    published size. tokens: learned together with a LoRA, or alone by textual inversion. precision: ``bfloat16`` runs
    the model under autocast; the trained weights stay float32, since changes of a bfloat16 weight below its rounding
    are lost. save_every, log_every: steps.
    """

    target: str
    output: str
    name: str = ""
    steps: int = 1000
    batch_size: int = 1
    seed: int = 0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    save_every: int = 500
    log_every: int = 10
    tensorboard: bool = True
    network: dict = field(default_factory=dict)
    models: Models = Models()
    data: Data = Data()
    prior: Prior = Prior()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    lora: LoRA = LoRA()
    lcm: LCM = LCM()
    tokens: tuple[Token, ...] = ()
    controlnet: ControlNetSettings = ControlNetSettings()
    ip_adapter: IPAdapterSettings = IPAdapterSettings()
    samples: Samples = Samples()
    encoders: Encoders = Encoders()
