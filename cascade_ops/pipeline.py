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
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from . import memory, stages
from .acceleration import CUDA_GRAPH, accelerated
from .catalog import AUTO, BUNDLED, STAGE_FOLDERS, FilesOf, ModelFile, best, bundled, embedding_finder
from .checkpoints.errors import STAGE_TITLES
from .denoisers import TextCondition
from .diffusion import StepInfo
from .handles import StageHandle
from .image_prompts import ImagePrompt, embed_prompts
from .model_folders import find_model, list_models, roots_from_environment
from .quantized import float_dtype
from .reuse import InnerReuse, reuse_inner
from .turns import StageFile, Turns, changed, in_turns
from .wires import Latent

if TYPE_CHECKING:
    from PIL import Image

_STAGES = ("text_encoder", "stage_c", "stage_b", "stage_a")
_OPTIONAL = "image_encoder"

PipelineCallback = Callable[[str, StepInfo], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class CascadePipeline:
    """Four stages, and an image encoder where it was asked for; `load` makes one, `generate` makes pictures.

    A `StageFile` is a stage that is read for its turn; `turns` says how the stages are run, None where they are.
    """

    text_encoder: StageHandle | StageFile
    stage_c: StageHandle | StageFile
    stage_b: StageHandle | StageFile
    stage_a: StageHandle | StageFile
    find_embedding: Callable[[str], str | None] | None = None
    image_encoder: StageHandle | StageFile | None = None
    turns: Turns | None = None

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] = AUTO,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        image_encoder: bool = False,
        acceleration: str = "",
        memory: str = "auto",
    ) -> CascadePipeline:
        """Load all stages; their weights stay on the device if there is room for them.

        source: ``auto``, the best files below ``./models`` and the folders named in the environment variable
            ``CASCADE_MODELS``, laid out as ComfyUI's; ``tiny``, the bundled family; a folder, the best of all files
            in it; or a mapping from ``stage_c``, ``stage_b``, ``stage_a`` and ``text_encoder`` to files, where a stage
            that is left out is found as by ``auto``. A stage without a file is the bundled tiny one.
        device: None is CUDA where there is one, else the CPU. dtype: see `handles.choose_dtype`; None is ``auto``, and
            weights of 8 bits are for Stage C and Stage B, with the others as by ``auto``.
        image_encoder: load that too, for `generate(images=...)`; so does a mapping that names it.
        acceleration: one of `acceleration.METHODS`, for the stages that it is for; empty is none.
        memory: what to do about the memory of the device, see `turns.in_turns`: ``auto``, ``resident``, ``one stage``
            or ``streamed``.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = source if isinstance(source, Mapping) else {}
        unknown = sorted(set(chosen) - {*_STAGES, _OPTIONAL})
        if unknown:
            raise ValueError(
                f"The source names {unknown[0]!r}, expected stages out of {', '.join((*_STAGES, _OPTIONAL))}."
            )
        files_of = model_files(AUTO if isinstance(source, Mapping) else source)
        files = {}
        for stage in (*_STAGES, _OPTIONAL) if image_encoder or _OPTIONAL in chosen else _STAGES:
            if stage in chosen:
                file = ModelFile(Path(chosen[stage]).name, os.fspath(chosen[stage]))
            else:
                file = bundled(stage) if source == "tiny" else best(stage, files_of)
            if file.name == BUNDLED and not os.path.exists(file.path):
                raise ValueError(
                    f"No {STAGE_TITLES[stage]} file was found and the bundled one is missing: name a folder or files."
                )
            files[stage] = StageFile(file.path, stage, file.name, float_dtype(stage, dtype or "auto"), device)
        turns, handles = in_turns(files, device, memory)
        if acceleration:
            for stage in ("stage_c", "stage_b", "stage_a"):
                if acceleration != CUDA_GRAPH or stage != "stage_a":
                    handles[stage] = changed(handles[stage], lambda each: accelerated(each, acceleration, device)[0])
        return cls(**handles, find_embedding=embedding_finder(files_of("embeddings")), turns=turns)

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
        reuse_b: InnerReuse | None = None,
    ) -> list[Image.Image]:
        """Make `batch_size` pictures of a prompt; picture i has the seed ``seed + i``.

        width, height: pixels, any size; 0 is Stage C's own. guidance: 0 is the model's own, 1 is off. settings_c,
        settings_b: everything else about sampling; steps and guidance in them are replaced by the arguments.
        callback: called with the stage's name and a `StepInfo` after every step; an exception it raises ends the run.
        images: pictures that Stage C reads beside the prompt, all of them for every picture that is made.
        compression: pixels per cell of Stage C, 0 is the published 42.67; see `sizes.proposed_compression` for pictures
        beyond 2560 pixels. tile: Stage A decodes in tiles of so many pixels, 0 is as a whole where that fits.
        reuse_b: an approximation: Stage B does not compute its inner levels in every step; see `reuse`.

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

        def encode(handle: StageHandle) -> tuple[TextCondition, TextCondition]:
            positive = stages.encode_text(handle, prompt, self.find_embedding)
            return positive, stages.encode_text(handle, negative_prompt, self.find_embedding)

        def start(handle: StageHandle) -> Latent:
            return stages.empty_latent(handle, width, height, batch_size, compression)

        def sample_c(handle: StageHandle) -> Latent:
            return stages.sample_stage_c(
                handle,
                positive,
                negative,
                start(handle),
                seed=seed,
                settings=replace(settings_c or default, steps=steps_c, guidance=guidance_c),
                pictures=pictures,
                callback=report("stage_c"),
            )

        def reusing(handle: StageHandle) -> StageHandle:
            return handle if reuse_b is None else reuse_inner(handle, reuse_b)

        def sample_b(handle: StageHandle) -> Latent:
            return stages.sample_stage_b(
                reusing(handle),
                prior,
                positive,
                negative,
                seed=seed,
                settings=chosen_b,
                callback=report("stage_b"),
            )

        def decode(handle: StageHandle) -> Tensor:
            fitting, _ = memory.fitting_tile(handle, detail.samples.shape, tile)
            return stages.decode_stage_a(handle, detail, tile=fitting)

        positive, negative = prompts = self._run(self.text_encoder, encode)
        pictures = None
        if images and self.image_encoder is not None:
            pictures = self._run(self.image_encoder, lambda handle: embed_prompts(handle, images))
        prior = self._run(
            self.stage_c, sample_c, lambda handle: memory.stage_c_bytes(handle, start(handle), prompts, pictures)
        )
        chosen_b = replace(settings_b or default, steps=steps_b, guidance=guidance_b)
        detail = self._run(
            self.stage_b, sample_b, lambda handle: memory.stage_b_bytes(reusing(handle), prior, chosen_b)
        )
        made = self._run(self.stage_a, decode, lambda handle: memory.decoding_bytes(handle, detail.samples.shape, tile))
        return [stages.to_picture(picture) for picture in made]

    def _run(
        self,
        stage: StageHandle | StageFile,
        work: Callable[[StageHandle], Result],
        needs: Callable[[StageHandle], int] | None = None,
    ) -> Result:
        turns = Turns(stage.device) if self.turns is None else self.turns
        return turns.run(stage, work, needs)


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
