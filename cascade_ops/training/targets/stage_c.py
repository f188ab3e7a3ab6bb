"""Stage C from scratch or fine-tuned: noise in its latents is predicted from text and pictures."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...checkpoints import save
from ...models import StageC
from ..draws import Draws
from ..memory_saving import checkpoint_blocks
from ..new_models import trained_model
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings
from ..stage_c_loss import StageCLoss, empty_prompt
from ..stage_c_samples import StageCSampler


class StageCObjective(Objective):
    """The diffusion loss of Stage C; source: the reference's ``train/train_c.py``."""

    def __init__(
        self,
        module: StageC,
        loss: StageCLoss,
        sampler: StageCSampler,
        config: dict,
        defaults: dict,
        name: str | None = None,
    ):
        super().__init__()
        self.module, self.loss, self.sampler = module, loss, sampler
        self.config, self.defaults, self.name = config, defaults, name
        pictures = {"image_embedding"} if loss.reads_pictures else set()
        self.needs = frozenset({"stage_c_latent", "text", "text_pooled"} | pictures)

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        conditions = self.loss.conditions(batch, draws)
        return self.loss.loss(
            lambda x, r: self.module(x, r, *conditions), batch["stage_c_latent"], draws, batch.get("loss_weight")
        )

    def export(self, folder: Path, name: str) -> list[Path]:
        path = folder / f"{name}.safetensors"
        return [save(self.module, path, stage="stage_c", config=self.config, defaults=self.defaults, name=self.name)]

    def sample(self, prompts: list[str], pictures: list[Tensor], seed: int, steps: int) -> Tensor:
        return self.sampler(self.module, prompts, seed, steps)


def build(settings: Settings, parts: Parts) -> StageCObjective:
    """Stage C from `models.init` or new, with the text encoder's empty prompt."""
    module, config, defaults = trained_model(settings, "stage_c")
    text_encoder = parts.load("text_encoder")
    loss = StageCLoss(settings, empty_prompt(text_encoder), module.clip_img_mapper.in_features)
    checkpoint_blocks(module, settings.gradient_checkpointing)
    defaults = {"width": settings.data.resolution, "height": settings.data.resolution, **defaults}
    sampler = StageCSampler(text_encoder, settings, defaults)
    return StageCObjective(module, loss, sampler, config, defaults, settings.name or None)
