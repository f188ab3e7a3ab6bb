"""The node that applies a LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..cascade_ops.catalog import fingerprint
from . import files
from .loaders import CATEGORY as LOADERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..cascade_ops.adapters.tokens import LearnedToken
    from ..cascade_ops.handles import StageHandle


_SHOWN = 5


class CascadeLoadLoRA:
    DESCRIPTION = (
        "Applies a LoRA, a small file that teaches a model a look or a subject, to Stage C and to the text encoder. "
        "The models that went in stay as they were; several can be applied one after another."
    )
    CATEGORY = LOADERS
    FUNCTION = "load"
    RETURN_TYPES = ("CASCADE_STAGE_C", "CASCADE_TEXT_ENCODER")
    RETURN_NAMES = ("stage_c", "text_encoder")
    OUTPUT_TOOLTIPS = (
        "Stage C with the LoRA, for 'Cascade: sample Stage C'.",
        "The text encoder with the LoRA and its learned words, for 'Cascade: encode text'. Only where a text encoder "
        "is connected.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def amount(tooltip: str) -> tuple:
            options = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05, "round": 0.001, "tooltip": tooltip}
            return ("FLOAT", options)

        return {
            "required": {
                "stage_c": ("CASCADE_STAGE_C", {"tooltip": "The model to change, from 'Cascade: load Stage C'."}),
                "file": (
                    files.choices("lora"),
                    {
                        "default": files.BUNDLED,
                        "tooltip": "The LoRA, of any known trainer. Files go into models/loras; the tiny one comes "
                        "with these nodes and fits the tiny Stage C.",
                    },
                ),
                "strength": amount("How much Stage C is changed. 1 is what was learned, 0 is off."),
            },
            "optional": {
                "text_encoder": (
                    "CASCADE_TEXT_ENCODER",
                    {
                        "tooltip": "The text encoder to change too, from 'Cascade: load text encoder'. Needed for a "
                        "LoRA that learned new words or changes the text encoder."
                    },
                ),
                "text_strength": amount(
                    "How much the text encoder is changed. 1 is what was learned; at 0 it does not know the learned "
                    "words either."
                ),
                "token": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Names the new words that the file learned, as you write them in prompts, such as "
                        "[fernando], with commas between several. Empty takes the file's own names; files of the "
                        "original trainer have none.",
                    },
                ),
                "initial_word": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "What each new word started as in training, with commas between several: a word "
                        "such as dog, or the pattern of the training configuration. Only for files of the original "
                        "trainer; empty there means that it started as nothing.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **settings: object) -> str:
        return fingerprint(files.find("lora", file).path)

    def load(
        self,
        stage_c: StageHandle,
        file: str,
        strength: float,
        text_encoder: StageHandle | None = None,
        text_strength: float = 1.0,
        token: str = "",
        initial_word: str = "",
    ) -> dict[str, Any]:
        from ..cascade_ops.adapters.dialects import read_lora
        from ..cascade_ops.adapters.lora import apply_lora
        from ..cascade_ops.adapters.merging import unmerged
        from ..cascade_ops.adapters.tokens import given_names, with_tokens

        names = given_names(token, initial_word)
        if names and text_encoder is None:
            raise ValueError(
                f"token is {token!r} and no text encoder is connected, which would know the word: connect it at "
                "'text_encoder', or empty 'token'."
            )
        _check_weights(stage_c, text_encoder)
        lora = read_lora(files.find("lora", file).path, unmerged(stage_c).network, tokens=names)
        said = []
        if "stage_c" in lora.stages:
            stage_c, report = apply_lora(stage_c, lora, strength)
            said.append(f"{stage_c.title} at {strength:g}: {report.describe()}")
            if lora.defaults and strength:
                own = ", ".join(f"{name} {value:g}" for name, value in lora.defaults.items())
                said.append(f"samples from now on with the LoRA's own {own}, where these are 0")
        words = _listed(lora.tokens)
        if text_encoder is not None:
            if "text_encoder" in lora.stages:
                text_encoder, report = apply_lora(text_encoder, lora, text_strength)
                said.append(f"{text_encoder.title} at {text_strength:g}: {report.describe()}")
            if lora.tokens and text_strength:
                _check_names(file, lora.tokens)
                text_encoder = with_tokens(text_encoder, lora.tokens)
                said.append(f"learned words: {words}")
        elif not said:
            raise ValueError(
                f"{file} changes nothing of Stage C{', it holds the learned words ' + words if words else ''}: connect "
                "the text encoder at 'text_encoder'."
            )
        elif "text_encoder" in lora.stages or lora.tokens:
            more = f" and the learned words {words}" if words else ""
            said.append(f"connect the text encoder to use what the LoRA changes of it{more}")
        return {"ui": {"text": said}, "result": (stage_c, text_encoder)}


def _listed(tokens: Sequence[LearnedToken]) -> str:
    """The first of the learned words, and how many more there are: a file can hold one for each word of a kind."""
    words = [token.token or ("a word without a name" if token.is_new else "a piece of a word") for token in tokens]
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _check_names(file: str, tokens: Sequence[LearnedToken]) -> None:
    nameless = sum(token.is_new and not token.token for token in tokens)
    if nameless:
        raise ValueError(
            f"{file} learned {nameless} new words and does not say which, expected their names: write them into "
            "'token', such as [fernando], and what each started as into 'initial_word', such as dog, as in the "
            "training configuration."
        )


def _check_weights(*handles: StageHandle | None) -> None:
    from ..cascade_ops.adapters.merging import unmerged
    from .comfyui_layers import LentAttention

    for handle in handles:
        if handle is not None and any(isinstance(layer, LentAttention) for layer in unmerged(handle).network.modules()):
            raise ValueError(
                f"{handle.title} runs on the weights of ComfyUI's own model, which this LoRA loader cannot change, "
                "expected one from a Cascade loader: apply the LoRA with ComfyUI's LoRA loader, before 'Cascade: "
                "Stage C from MODEL'."
            )
