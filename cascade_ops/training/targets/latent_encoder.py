"""The latent encoder with the previewer, from scratch or fine-tuned, and on request together with Stage B."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints import load, save
from ...models import LatentEncoder, Previewer
from ...models.effnet import normalize_imagenet
from ...sizes import encoder_picture_size, stage_c_size
from ..draws import Draws
from ..kept import KeptPictures
from ..latent_encoder import LatentReaders, fold_latent, previewer_input, refit_latent_norm
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings
from ..stage_c_loss import empty_prompt
from .stage_b import StageBObjective

# Share of the readers' loss beside Stage B's diffusion loss.
_READERS_WEIGHT = 0.5


class LatentEncoderObjective(Objective):
    """The encoder and the previewer with the heads that read the latent, and Stage B where it learns with them.

    With Stage B the encoder learns what Stage B can use, as in Pernias et al., "Würstchen" (2023), section 3: the
    diffusion loss reaches it through the condition.

    config: constructor arguments of the encoder; previewer_config: of the previewer.
    fine_tuned: the encoder starts from a file; the statistics of its inner batch norms stay.
    """

    def __init__(
        self,
        encoder: LatentEncoder,
        previewer: Previewer,
        settings: Settings,
        config: dict[str, Any],
        previewer_config: dict[str, Any],
        stage_b: StageBObjective | None = None,
        fine_tuned: bool = False,
    ):
        super().__init__()
        self.encoder, self.previewer, self.stage_b = encoder, previewer, stage_b
        self.settings, self.config, self.previewer_config = settings, config, previewer_config
        self.fine_tuned, self._frozen = fine_tuned, False
        self.readers = LatentReaders(encoder.mapper[0].out_channels, settings.encoders.maps)
        self.kept = KeptPictures(settings.encoders.fitted_on)
        self.needs = frozenset({"image"})
        if settings.encoders.maps:
            self.needs |= {"maps"}
        if stage_b is not None:
            self.needs |= stage_b.needs - {"stage_c_latent"}

    def at(self, step: int, steps: int) -> None:
        self._frozen = step >= self.settings.encoders.frozen_from * steps

    def set_modes(self) -> None:
        """Training or evaluation mode of every batch norm, for the phase that the run is in."""
        learning = not self._frozen
        self.encoder.train(learning and not self.fine_tuned)
        self.previewer.train(learning and not self.fine_tuned)
        self.encoder.mapper[1].train(learning)

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        self.set_modes()
        image = encoder_picture(batch["image"])
        self.kept.add(image)
        clean = self.encoder(normalize_imagenet(image)).float()
        level = draws.uniform(1, 1, 1) * self.settings.encoders.noise
        latent = clean + (level * draws.normal(*clean.shape[1:])).to(clean.device)
        maps = batch["maps"] if self.settings.encoders.maps else None
        loss, figures = self.readers.loss(latent, self.previewer(latent), image, maps)
        if self.stage_b is None:
            return StepResult(loss, figures=figures)
        result = self.stage_b({**batch, "stage_c_latent": clean}, draws)
        figures = {**figures, **result.figures, "diffusion": result.loss.detach()}
        return StepResult(result.loss + _READERS_WEIGHT * loss, result.error, result.log_snr, figures)

    def observe(self, log_snr: Tensor, error: Tensor) -> None:
        if self.stage_b is not None:
            self.stage_b.observe(log_snr, error)

    def state(self) -> dict[str, Tensor]:
        stage_b = {} if self.stage_b is None else self.stage_b.state()
        return {**self.kept.state(), **{f"stage_b.{name}": value for name, value in stage_b.items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.kept.load_state(state)
        if self.stage_b is not None:
            part = {name[8:]: value for name, value in state.items() if name.startswith("stage_b.")}
            self.stage_b.load_state(part)

    def export(self, folder: Path, name: str) -> list[Path]:
        """Write ``<name>.safetensors``, ``<name>_previewer.safetensors`` and, with it, ``<name>_stage_b.safetensors``.

        The scale of the latent is fitted on the run's last pictures; what reads it is changed so that it does the same.
        """
        encoder, previewer = (copy.deepcopy(part).cpu().eval() for part in (self.encoder, self.previewer))
        gain, shift = refit_latent_norm(encoder, self.kept.images(32))
        fold_latent(previewer_input(previewer), gain, shift)
        model = self.settings.name or None
        paths = [
            save(encoder, folder / f"{name}.safetensors", stage="latent_encoder", config=self.config, name=model),
            save(
                previewer,
                folder / f"{name}_previewer.safetensors",
                stage="previewer",
                config=self.previewer_config,
                name=model,
            ),
        ]
        if self.stage_b is not None:
            stage_b = copy.deepcopy(self.stage_b.module).cpu()
            fold_latent(stage_b.effnet_mapper[0], gain, shift)
            path = folder / f"{name}_stage_b.safetensors"
            config, defaults = self.stage_b.config, self.stage_b.defaults
            paths.append(save(stage_b, path, stage="stage_b", config=config, defaults=defaults, name=model))
        return paths


def encoder_picture(image: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` at the size that the latent encoder sees: three quarters, in steps of 32 pixels."""
    size = encoder_picture_size(*stage_c_size(*image.shape[-2:]))
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)


def build(settings: Settings, parts: Parts) -> LatentEncoderObjective:
    """From scratch with `network` and `encoders.previewer`, or from `models.init` with the previewer of
    `models.previewer`."""
    torch.manual_seed(settings.seed)
    fine_tuned = settings.models.init != "none"
    if fine_tuned:
        encoder, info = load(Path(settings.models.init), "latent_encoder", dtype=torch.float32)
        encoder.requires_grad_(True)
        handle = parts.load("previewer", trained=True)
        previewer = handle.module.requires_grad_(True)
        config, previewer_config = dict(info.config), dict(handle.info.config)
    else:
        config, previewer_config = dict(settings.network), dict(settings.encoders.previewer)
        encoder, previewer = LatentEncoder(**config), Previewer(**previewer_config)
    return LatentEncoderObjective(
        encoder, previewer, settings, config, previewer_config, _stage_b(settings, parts), fine_tuned
    )


def _stage_b(settings: Settings, parts: Parts) -> StageBObjective | None:
    if not settings.encoders.with_stage_b:
        return None
    handle = parts.load("stage_b", trained=True)
    module = handle.module.train().requires_grad_(True)
    empty = empty_prompt(parts.load("text_encoder"))
    return StageBObjective(module, settings, empty.pooled, dict(handle.info.config), dict(handle.info.defaults))
