"""Nodes that train: what comes out can be sampled at once in the same graph, and is a file in the models folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import files
from .training_inputs import (
    IMAGE_ENCODER,
    LATENT_ENCODER,
    RESUME,
    STAGE_C,
    TEXT_ENCODER,
    caption_lines,
    captions_for,
    captions_input,
    in_input_directory,
    number,
    one_source,
    run_inputs,
    source_inputs,
    text,
    words,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_ops.handles import StageHandle
    from ..cascade_ops.training.settings import Settings
    from .training_run import Learned

CATEGORY = "cascade/training"

_FILE = "Name of the file that was written, below models/{folder}."
# Of the learning rate. Not a share of the steps, of which a resumed run may want more.
_WARMUP = 10

_CURVE = "The error of every step against the run's average at the same noise level, and a smoothed line, as a picture."


class CascadeTrainLoRA:
    DESCRIPTION = (
        "Teaches Stage C what some pictures show, such as a look, a thing or a person: a small LoRA file is learned, "
        "and if you name a new word, what that word means."
    )
    CATEGORY = CATEGORY
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("CASCADE_STAGE_C", "CASCADE_TEXT_ENCODER", "STRING", "IMAGE")
    RETURN_NAMES = ("stage_c", "text_encoder", "file", "loss_curve")
    OUTPUT_TOOLTIPS = (
        "Stage C with the LoRA on it, for 'Cascade: sample Stage C'.",
        "The text encoder, which knows the new word, for 'Cascade: encode text'.",
        _FILE.format(folder="loras"),
        _CURVE,
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_c": STAGE_C,
                "text_encoder": TEXT_ENCODER,
                "latent_encoder": LATENT_ENCODER,
                "captions": captions_input("Use the new word in it, as in: a photo of [fernando] on a beach."),
                **run_inputs("my_lora", 500, 1e-4, 4),
            },
            "optional": {
                **source_inputs(),
                "token": text(
                    "",
                    "A new word in brackets that shall mean what the pictures show, such as [fernando], or a word that "
                    "is there already. Empty learns no word.",
                ),
                "initial_words": text(
                    "",
                    "What the new word means before training: the nearest thing that the model knows, such as: dog. It "
                    "learns faster from there.",
                ),
                "rank": number(
                    "INT", 16, 1, 512, "How much the LoRA can hold. 4 to 16 suit one subject, 32 and more a style."
                ),
                "alpha": number(
                    "FLOAT",
                    16.0,
                    0.01,
                    1024.0,
                    "Scales the LoRA by alpha / rank. Keep it equal to the rank, or at half of it.",
                    step=0.5,
                    round=0.01,
                ),
                "modules": text(
                    ".attn",
                    "Which layers learn: those with one of these words in their names, separated by commas. .attn is "
                    "all attention, which is enough for most; empty is every layer.",
                ),
                "resume": RESUME,
            },
        }

    def train(
        self,
        stage_c: StageHandle,
        text_encoder: StageHandle,
        latent_encoder: StageHandle,
        captions: str,
        token: str = "",
        initial_words: str = "",
        rank: int = 16,
        alpha: float = 16.0,
        modules: str = ".attn",
        **run: Any,
    ) -> dict[str, Any]:
        from ..cascade_ops.adapters.dialects import read_lora
        from ..cascade_ops.adapters.lora import apply_lora
        from ..cascade_ops.adapters.tokens import with_tokens
        from ..cascade_ops.training.settings import LoRA, Token

        token, initial_words = token.strip(), initial_words.strip()
        if initial_words and not token:
            raise ValueError(
                f"initial_words is {initial_words!r} and token is empty, expected a new word that starts as that: name "
                "it, such as [thing], or empty initial_words."
            )
        if token and caption_lines(captions) and not any(token in line for line in caption_lines(captions)):
            raise ValueError(
                f"None of the captions has the word {token} in it, so that nothing would teach what it means, expected "
                "it in each: write it where the thing is named."
            )
        learned = _trained(
            "lora",
            {"stage_c": stage_c, "text_encoder": text_encoder, "latent_encoder": latent_encoder},
            captions,
            "lora",
            {
                "lora": LoRA(rank=rank, alpha=alpha, modules=words(modules) or ("",)),
                "tokens": (Token(token, initial_words),) if token else (),
            },
            **run,
        )
        lora = read_lora(learned.path, stage_c.module)
        stage_c, report = apply_lora(stage_c, lora)
        notes = [f"{learned.file}: {report.describe()}"]
        if lora.tokens:
            text_encoder = with_tokens(text_encoder, lora.tokens)
            notes += [
                f"{learned_token.token} in a prompt is what was learned; for text encoders without this LoRA it is "
                f"embedding:{path.stem}"
                for learned_token, path in zip(lora.tokens, learned.more, strict=True)
            ]
        return _answer(learned, (stage_c, text_encoder, learned.file), notes)


class CascadeTrainControlNet:
    DESCRIPTION = (
        "Teaches a ControlNet: to draw what edges say, to fill holes in pictures, to enlarge them, or to keep a face. "
        "Needs many pictures and steps; Stage C stays as it is."
    )
    CATEGORY = CATEGORY
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("CASCADE_CONTROLNET", "STRING", "IMAGE")
    RETURN_NAMES = ("controlnet", "file", "loss_curve")
    OUTPUT_TOOLTIPS = (
        "The ControlNet, for 'Cascade: apply ControlNet'.",
        _FILE.format(folder="controlnet"),
        _CURVE,
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_c": STAGE_C,
                "text_encoder": TEXT_ENCODER,
                "latent_encoder": LATENT_ENCODER,
                # As in cascade_ops.training.settings.CONTROL_KINDS, which is not imported here because its package
                # needs PyTorch.
                "kind": (
                    ["canny", "inpainting", "super_resolution", "identity"],
                    {
                        "default": "canny",
                        "tooltip": "What steers the picture: edges, a picture with a hole, a smaller picture, or the "
                        "faces in it.",
                    },
                ),
                "captions": captions_input("The control says where things are, the caption what they are."),
                **run_inputs("my_controlnet", 1000, 1e-4, 4),
            },
            "optional": {
                **source_inputs(),
                "faces": text(
                    "",
                    "For identity: a file with the boxes and embeddings of the faces in each picture of the folder; "
                    "below the input folder, or a whole path.",
                ),
                "resume": RESUME,
            },
        }

    def train(
        self,
        stage_c: StageHandle,
        text_encoder: StageHandle,
        latent_encoder: StageHandle,
        kind: str,
        captions: str,
        faces: str = "",
        **run: Any,
    ) -> dict[str, Any]:
        from ..cascade_ops.training.settings import ControlNetSettings

        faces = faces.strip()
        if kind == "identity" and run.get("pictures") is not None:
            raise ValueError(
                "Pictures are connected and the kind is identity, whose faces are known by the names of files, "
                "expected a folder: name one, and disconnect pictures."
            )
        if (kind == "identity") != bool(faces):
            found, wanted = ("named", "none") if faces else ("empty", "a file of boxes and embeddings")
            raise ValueError(f"faces is {found} and the kind is {kind}, expected {wanted} with it: change one of them.")
        learned = _trained(
            "controlnet",
            {"stage_c": stage_c, "text_encoder": text_encoder, "latent_encoder": latent_encoder},
            captions,
            "controlnet",
            {"controlnet": ControlNetSettings(kind, in_input_directory(faces) if faces else "")},
            **run,
        )
        return _answer(learned, (_loaded(learned, "controlnet"), learned.file), [learned.file])


class CascadeTrainIPAdapter:
    DESCRIPTION = (
        "Teaches an IP-Adapter: to make pictures that resemble a picture that it is shown, beside what the prompt "
        "says. Needs many pictures and steps; Stage C stays as it is."
    )
    CATEGORY = CATEGORY
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("CASCADE_IP_ADAPTER", "STRING", "IMAGE")
    RETURN_NAMES = ("ip_adapter", "file", "loss_curve")
    OUTPUT_TOOLTIPS = (
        "The IP-Adapter, for 'Cascade: apply IP-Adapter'.",
        _FILE.format(folder=files.WHERE["ip_adapter"]),
        _CURVE,
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "stage_c": STAGE_C,
                "text_encoder": TEXT_ENCODER,
                "latent_encoder": LATENT_ENCODER,
                "image_encoder": IMAGE_ENCODER,
                "captions": captions_input("The prompt will say that much, the shown picture the rest."),
                **run_inputs("my_ip_adapter", 1000, 1e-4, 4),
            },
            "optional": {
                **source_inputs(),
                "tokens": number(
                    "INT",
                    4,
                    1,
                    64,
                    "How many words' worth of content is read from the shown picture. More follow it more closely.",
                ),
                "resume": RESUME,
            },
        }

    def train(
        self,
        stage_c: StageHandle,
        text_encoder: StageHandle,
        latent_encoder: StageHandle,
        image_encoder: StageHandle,
        captions: str,
        tokens: int = 4,
        **run: Any,
    ) -> dict[str, Any]:
        from ..cascade_ops.training.settings import IPAdapterSettings

        given = {"stage_c": stage_c, "text_encoder": text_encoder, "latent_encoder": latent_encoder}
        learned = _trained(
            "ip_adapter",
            {**given, "image_encoder": image_encoder},
            captions,
            "ip_adapter",
            {"ip_adapter": IPAdapterSettings(tokens=tokens)},
            **run,
        )
        return _answer(learned, (_loaded(learned, "ip_adapter"), learned.file), [learned.file])


def _trained(
    target: str,
    given: dict[str, StageHandle],
    captions: str,
    kind: str,
    own: dict[str, Any],
    *,
    name: str,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    pictures: Tensor | None = None,
    folder: str = "",
    resolution: int = 0,
    resume: bool = False,
) -> Learned:
    """Train `target` with the widgets that all training nodes share; own: further settings."""
    from ..cascade_ops.stages import own_size
    from ..cascade_ops.training.settings import Data, Loss, Optimizer, Settings, Source
    from .training_run import learn

    for stage, handle in given.items():
        handle.expect(stage)
    path, lines = one_source(pictures, folder), caption_lines(captions)
    if path and len(lines) > 1:
        raise ValueError(
            f"captions has {len(lines)} lines for a folder, expected one for all of its pictures, or none: write the "
            "others into the .txt files beside the pictures."
        )
    settings: Settings = Settings(
        target=target,
        output="",
        name=name.strip(),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        data=Data(
            sources=(Source(path, caption="".join(lines)),) if path else (),
            resolution=max(own_size(given["stage_c"], resolution, resolution)),
            # Stage C's own picture tokens are not what an adapter learns from.
            image_embedding_dropout=1.0,
        ),
        optimizer=Optimizer(learning_rate=learning_rate, warmup=_WARMUP),
        # What the adaptive weight wants for the small batches of one device.
        loss=Loss(buckets=24, interpolate=True),
    )
    return learn(
        replace(settings, **own),
        given,
        pictures,
        [] if pictures is None else captions_for(lines, len(pictures)),
        name=settings.name,
        folder=files.WHERE[kind],
        resume=resume,
    )


def _loaded(learned: Learned, stage: str) -> StageHandle:
    from ..cascade_ops.handles import load_stage

    return load_stage(learned.path, stage, name=learned.file)


def _answer(learned: Learned, outputs: tuple, notes: list[str]) -> dict[str, Any]:
    from .training_run import shown_curve

    image, shown = shown_curve(learned.curve)
    return {"ui": {"text": [*notes, learned.said], "images": shown}, "result": (*outputs, image)}
