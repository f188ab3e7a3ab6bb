"""Stage A from scratch or fine-tuned: pictures through its latent and back."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints import load, save
from ...models import StageA
from ..draws import Draws
from ..kept import KeptPictures
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings
from ..stage_a import autoencoder_loss, fit_codebook, normalize_latent

# The published gates start at zero, which would leave the mixing blocks out; small values let them learn.
_GATE = 0.1


class StageAObjective(Objective):
    """The reconstruction of random parts of pictures, with a little noise on the latent.

    What is written has latents of mean 0 and deviation 1 per channel and a codebook that lies among them, both fitted
    on the run's last pictures.
    """

    needs = frozenset({"image"})

    def __init__(self, module: StageA, settings: Settings, config: dict):
        super().__init__()
        self.module, self.settings, self.config = module, settings, config
        self.kept = KeptPictures(settings.encoders.fitted_on)

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        image, step = batch["image"], self.module.compression
        side = self.settings.encoders.crop
        image = random_parts(image, side, draws) if side else image
        height, width = (length // step * step for length in image.shape[-2:])
        image = image[..., :height, :width]
        self.kept.add(image)
        noise = draws.normal(self.module.c_latent, height // step, width // step) * self.settings.encoders.noise
        loss, psnr = autoencoder_loss(self.module, image, noise.to(image.device) / self.module.scale_factor)
        return StepResult(loss, figures={"psnr": psnr})

    def state(self) -> dict[str, Tensor]:
        return self.kept.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.kept.load_state(state)

    def export(self, folder: Path, name: str) -> list[Path]:
        # A copy is fitted: the run may go on with these weights.
        module, images = copy.deepcopy(self.module).cpu(), self.kept.images(self.module.compression)
        normalize_latent(module, images)
        fit_codebook(module, images, torch.Generator().manual_seed(self.settings.seed))
        path = folder / f"{name}.safetensors"
        return [save(module, path, stage="stage_a", config=self.config, name=self.settings.name or None)]


def random_parts(image: Tensor, side: int, draws: Draws) -> Tensor:
    """A random ``side x side`` part of each picture ``[B, 3, H, W]``; smaller sides stay as they are."""
    height, width = image.shape[-2:]
    high, wide = min(side, height), min(side, width)
    top, left = draws.integers(height - high + 1).tolist(), draws.integers(width - wide + 1).tolist()
    return torch.stack([p[:, y : y + high, x : x + wide] for p, y, x in zip(image, top, left, strict=True)])


def build(settings: Settings, parts: Parts) -> StageAObjective:
    """Stage A from `models.init`, or new with `network`."""
    if settings.models.init != "none":
        module, info = load(Path(settings.models.init), "stage_a", dtype=torch.float32)
        return StageAObjective(module.requires_grad_(True), settings, dict(info.config))
    torch.manual_seed(settings.seed)
    module = StageA(**settings.network)
    for name, parameter in module.named_parameters():
        if name.endswith("gammas"):
            nn.init.constant_(parameter, _GATE)
    return StageAObjective(module, settings, settings.network)
