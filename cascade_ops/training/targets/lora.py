"""LoRA on Stage C, with learned tokens where the settings name some.

Source: the reference's ``train/train_c_lora.py`` in Stability-AI/StableCascade.
"""

from __future__ import annotations

from pathlib import Path

from ...adapters.dialects import read_lora, write_lora
from ...adapters.lora import LoRA
from ...handles import StageHandle
from ..lora_layers import LoRALayer, add_lora
from ..memory_saving import checkpoint_blocks
from ..parts import Parts
from ..settings import Settings
from ..tokens import TrainedTokens
from .textual_inversion import TokensObjective


class LoRAObjective(TokensObjective):
    """The diffusion loss of a Stage C whose weights are frozen and have small changes that learn.

    start: a LoRA to go on with. The other arguments are those of `TokensObjective`; see `add_lora` for the errors.
    """

    def __init__(
        self,
        settings: Settings,
        handle: StageHandle,
        text_encoder: StageHandle,
        tokens: TrainedTokens | None,
        start: LoRA | None = None,
    ):
        super().__init__(settings, handle, text_encoder, tokens)
        weights = start.weights if start else None
        self.layers: dict[str, LoRALayer] = add_lora(self.module, settings.lora, settings.seed, weights)

    def lora(self) -> LoRA:
        """What was learned so far."""
        settings = self.settings.lora
        config = {
            "rank": settings.rank,
            "alpha": settings.alpha,
            "dora": settings.dora,
            "modules": list(settings.modules),
            "base": self.handle.title,
        }
        weights = {name: layer.weights() for name, layer in self.layers.items()}
        return LoRA(weights, () if self.tokens is None else self.tokens.learned(), config, self.settings.name)

    def export(self, folder: Path, name: str) -> list[Path]:
        """One LoRA file per dialect, ``<name>.safetensors`` for ComfyUI and ``<name>_<dialect>.safetensors`` for
        others, and one embedding file per token."""
        lora = self.lora()
        paths = []
        for dialect in self.settings.lora.dialects:
            path = folder / (f"{name}.safetensors" if dialect == "comfyui" else f"{name}_{dialect}.safetensors")
            paths.append(write_lora(lora, path, dialect, base=self.handle.module))
        return paths + super().export(folder, name)


def build(settings: Settings, parts: Parts) -> LoRAObjective:
    """A LoRA of the settings' Stage C; `models.init` is a LoRA file to go on with, tokens included.

    Raises:
        ValueError: settings that no file of the chosen dialects could hold, or that do not fit the model or the file
            to go on with.
    """
    check_dialects(settings)
    handle, text_encoder = parts.load("stage_c"), parts.load("text_encoder")
    start = None if settings.models.init == "none" else read_lora(settings.models.init, handle.module)
    tokens = None
    if settings.tokens:
        tokens = TrainedTokens(text_encoder, settings.tokens, start.tokens if start else ())
    elif start and start.tokens:
        raise ValueError(
            f"The LoRA to go on with has learned the token {start.tokens[0].token!r}, and the run learns none: name it "
            "in 'tokens', so that it is not lost."
        )
    objective = LoRAObjective(settings, handle, text_encoder, tokens, start)
    checkpoint_blocks(objective.module, settings.gradient_checkpointing)
    return objective


def check_dialects(settings: Settings) -> None:
    """Refuse before the training what would be refused after it."""
    lora = settings.lora
    if not lora.dialects:
        raise ValueError("'lora.dialects' is empty, expected at least one to write the result in: name comfyui.")
    for dialect in lora.dialects:
        if lora.dora and dialect in ("reference", "diffusers"):
            raise ValueError(
                f"The LoRA dialect {dialect} cannot hold the sizes that DoRA learns, expected comfyui or onetrainer "
                "with it: switch 'lora.dora' off or write another dialect."
            )
    wide = [token.token for token in settings.tokens if token.vectors > 1]
    if wide and "reference" in lora.dialects:
        raise ValueError(
            f"The token {wide[0]!r} is to have several vectors, and the LoRA dialect reference holds one for each "
            "token: give it one, or write another dialect."
        )
