"""The whole chain for people without a graph.

    from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline

    pipeline = CascadePipeline.load()
    pipeline.generate("a large red circle on a blue background", seed=7)[0].save("circle.png")

Pictures speak beside the words, or instead of them:

    pipeline = CascadePipeline.load(image_encoder=True)
    pipeline.generate("a small star on the left", images=[ImagePrompt.read("photo.jpg", weight=0.5)])

The same files, prompt, seed and settings give the same picture as the graph, to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import stages
from .catalog import AUTO, BUNDLED, STAGE_FOLDERS, FilesOf, ModelFile, best, bundled, embedding_finder
from .checkpoints.errors import STAGE_TITLES
from .diffusion import StepInfo
from .handles import StageHandle, load_stage
from .image_prompts import ImagePrompt, embed_prompts
from .model_folders import find_model, list_models, roots_from_environment

if TYPE_CHECKING:
    from PIL import Image

_STAGES = ("text_encoder", "stage_c", "stage_b", "stage_a")
_OPTIONAL = "image_encoder"

PipelineCallback = Callable[[str, StepInfo], None]


@dataclass(frozen=True)
class CascadePipeline:
    """Four loaded stages, and an image encoder where it was asked for; `load` makes one, `generate` makes pictures."""

    text_encoder: StageHandle
    stage_c: StageHandle
    stage_b: StageHandle
    stage_a: StageHandle
    find_embedding: Callable[[str], str | None] | None = None
    image_encoder: StageHandle | None = None

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] = AUTO,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        image_encoder: bool = False,
    ) -> CascadePipeline:
        """Load all stages; their weights stay on the device.

        source: ``auto``, the best files below ``./models`` and the folders named in the environment variable
            ``CASCADE_MODELS``, laid out as ComfyUI's; ``tiny``, the bundled family; a folder, the best of all files
            in it; or a mapping from ``stage_c``, ``stage_b``, ``stage_a`` and ``text_encoder`` to files, where a stage
            that is left out is found as by ``auto``. A stage without a file is the bundled tiny one.
        device: None is CUDA where there is one, else the CPU. dtype: see `handles.choose_dtype`; None is ``auto``.
        image_encoder: load that too, for `generate(images=...)`; so does a mapping that names it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = source if isinstance(source, Mapping) else {}
        unknown = sorted(set(chosen) - {*_STAGES, _OPTIONAL})
        if unknown:
            raise ValueError(
                f"The source names {unknown[0]!r}, expected stages out of {', '.join((*_STAGES, _OPTIONAL))}."
            )
        files_of = model_files(AUTO if isinstance(source, Mapping) else source)
        handles = {}
        for stage in (*_STAGES, _OPTIONAL) if image_encoder or _OPTIONAL in chosen else _STAGES:
            if stage in chosen:
                file = ModelFile(Path(chosen[stage]).name, os.fspath(chosen[stage]))
            else:
                file = bundled(stage) if source == "tiny" else best(stage, files_of)
            if file.name == BUNDLED and not os.path.exists(file.path):
                raise ValueError(
                    f"No {STAGE_TITLES[stage]} file was found and the bundled one is missing: name a folder or files."
                )
            handles[stage] = load_stage(
                file.path, stage, dtype=dtype or "auto", run_on=device, resident=True, name=file.name
            )
        return cls(**handles, find_embedding=embedding_finder(files_of("embeddings")))

    def generate(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        width: int = 0,
        height: int = 0,
        seed: int = 0,
        batch_size: int = 1,
        steps_c: int = 20,
        steps_b: int = 10,
        guidance_c: float = 0.0,
        guidance_b: float = 0.0,
        settings_c: stages.SamplingSettings | None = None,
        settings_b: stages.SamplingSettings | None = None,
        callback: PipelineCallback | None = None,
        images: Sequence[ImagePrompt] = (),
        compression: float = 0.0,
        tile: int = 0,
    ) -> list[Image.Image]:
        """Make `batch_size` pictures of a prompt; picture i has the seed ``seed + i``.

        width, height: pixels, any size; 0 is Stage C's own. guidance: 0 is the model's own, 1 is off. settings_c,
        settings_b: everything else about sampling; steps and guidance in them are replaced by the arguments.
        callback: called with the stage's name and a `StepInfo` after every step; an exception it raises ends the run.
        images: pictures that Stage C reads beside the prompt, all of them for every picture that is made.
        compression: pixels per cell of Stage C, 0 is the published 42.67; see `sizes.proposed_compression` for pictures
        beyond 2560 pixels. tile: Stage A decodes in tiles of so many pixels, 0 is as a whole.

        Raises ValueError for `images` in a pipeline that was loaded without the image encoder.
        """
        if images and self.image_encoder is None:
            raise ValueError(
                f"{len(images)} image prompts were given to a pipeline that has no image encoder to read them: load "
                "it with CascadePipeline.load(image_encoder=True)."
            )

        def report(stage: str) -> Callable[[StepInfo], None] | None:
            return None if callback is None else lambda info: callback(stage, info)

        default = stages.SamplingSettings()
        positive = stages.encode_text(self.text_encoder, prompt, self.find_embedding)
        negative = stages.encode_text(self.text_encoder, negative_prompt, self.find_embedding)
        latent = stages.sample_stage_c(
            self.stage_c,
            positive,
            negative,
            stages.empty_latent(self.stage_c, width, height, batch_size, compression),
            seed=seed,
            settings=replace(settings_c or default, steps=steps_c, guidance=guidance_c),
            pictures=embed_prompts(self.image_encoder, images) if self.image_encoder is not None else None,
            callback=report("stage_c"),
        )
        latent = stages.sample_stage_b(
            self.stage_b,
            latent,
            positive,
            negative,
            seed=seed,
            settings=replace(settings_b or default, steps=steps_b, guidance=guidance_b),
            callback=report("stage_b"),
        )
        pictures = stages.decode_stage_a(self.stage_a, latent, tile=tile)
        return [stages.to_picture(picture) for picture in pictures]


def model_files(source: str | os.PathLike[str]) -> FilesOf:
    """What `catalog.best` looks through."""
    if source == "tiny":
        return lambda stage: []
    if source != AUTO:
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give 'auto', 'tiny', a folder with model files, or a mapping.")
        learned = folder / "embeddings" if (folder / "embeddings").is_dir() else folder
        return lambda stage: _files_below(learned if stage == "embeddings" else folder)
    roots = [Path("models"), *roots_from_environment()]

    def files_of(stage: str) -> list[ModelFile]:
        folders = STAGE_FOLDERS.get(stage, (stage,))
        names = [(folder, name) for folder in folders for name in list_models(roots, folder)]
        return [ModelFile(name, find_model(roots, folder, name)) for folder, name in names]

    return files_of


def _files_below(folder: Path) -> list[ModelFile]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".sft") and path.is_file())
    return [ModelFile(path.relative_to(folder).as_posix(), str(path)) for path in paths]
