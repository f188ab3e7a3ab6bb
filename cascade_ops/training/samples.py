"""Pictures made while training, to see what was learned so far."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import stages
from ..wires import Latent
from .objective import Objective
from .parts import Parts
from .settings import Settings
from .stage_c_samples import evaluating

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES_FOLDER = "samples"
_STAGE_B_STEPS = 10


class Sampler:
    """Makes the pictures that `settings.samples` asks for, below ``samples`` in the run's folder.

    parts: has the previewer, or Stages B and A with the text encoder, for Stage C latents; loaded at the first picture.

    Raises:
        ValueError: a file of `settings.samples.pictures` is no picture.
    """

    def __init__(self, settings: Settings, parts: Parts, folder: Path):
        self.settings, self.parts, self.folder = settings.samples, parts, Path(folder) / SAMPLES_FOLDER
        # Read at once, so that a wrong name does not end a run at its first sample.
        self.pictures = [_read(Path(path)) for path in self.settings.pictures]

    def due(self, step: int) -> bool:
        """Whether to sample after this many steps."""
        return self.settings.every > 0 and step > 0 and step % self.settings.every == 0

    def write(self, objective: Objective, step: int) -> list[Path]:
        """Write ``step-000500_00.png``, one per prompt, which is in the file's text.

        Every time from the same seed, so that pictures differ by what was learned. The objective's modes and the
        random numbers of the program are left as they were. An empty list where the objective shows nothing.
        """
        settings = self.settings
        with undisturbed(objective):
            shown = objective.sample(list(settings.prompts), self.pictures, settings.seed, settings.steps)
            if shown is None:
                return []
            device = next(objective.parameters()).device
            pictures = shown if shown.shape[1] == 3 else self._decode(shown.float().cpu(), device)
        texts = {"step": str(step), "seed": str(settings.seed), "steps": str(settings.steps)}
        paths = []
        for index, (picture, prompt) in enumerate(zip(pictures.float().cpu(), settings.prompts, strict=True)):
            path = self.folder / f"step-{step:06}_{index:02}.png"
            write_png(path, stages.to_picture(picture.permute(1, 2, 0)), {"prompt": prompt, **texts})
            paths.append(path)
        return paths

    def _decode(self, samples: Tensor, device: torch.device) -> Tensor:
        """Stage C latents ``[N, 16, h, w]`` to pictures ``[N, 3, H, W]``."""
        if self.settings.chain == "preview":
            return stages.preview_latent(self.parts.load("previewer"), Latent(samples)).permute(0, 3, 1, 2)
        text_encoder = self.parts.load("text_encoder")
        # Copies on the training's device, which go when they have been used.
        stage_b, stage_a = (self.parts.load(stage).to(device) for stage in ("stage_b", "stage_a"))
        negative = stages.encode_text(text_encoder, "")
        pictures = []
        for index, prompt in enumerate(self.settings.prompts):
            latent = stages.sample_stage_b(
                stage_b,
                Latent(samples[index : index + 1]),
                stages.encode_text(text_encoder, prompt),
                negative,
                seed=self.settings.seed + index,
                settings=stages.SamplingSettings(steps=_STAGE_B_STEPS),
            )
            pictures.append(stages.decode_stage_a(stage_a, latent))
        return torch.cat(pictures).permute(0, 3, 1, 2)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; all modes and random numbers are as before after it."""
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(module):
        yield


def write_png(path: Path, picture: Image, texts: dict[str, str]) -> None:
    """Write a PNG with text chunks, under another name first, so that nobody sees half a file."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        picture.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Tensor:
    """A picture file as ``[3, H, W]`` float32, 0..1."""
    from .data.pictures import PictureError, as_tensor, read_picture

    try:
        with path.open("rb") as file:
            return as_tensor(read_picture(file)).contiguous()
    except (OSError, PictureError) as error:
        raise ValueError(
            f"`samples.pictures` names {path.name}, which cannot be read as a picture ({error}): choose another file."
        ) from error
