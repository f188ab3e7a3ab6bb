"""The file lists of the loaders: what they show, and which file a choice stands for."""

from __future__ import annotations

import contextlib
import os

from ..cascade_ops import catalog
from ..cascade_ops.catalog import AUTO, BUNDLED, ModelFile
from . import runtime

WHERE = {
    "stage_c": "diffusion_models",
    "stage_b": "diffusion_models",
    "stage_a": "vae",
    "text_encoder": "text_encoders",
    "previewer": "vae_approx",
    "latent_encoder": "vae",
    "image_encoder": "clip_vision",
    "controlnet": "controlnet",
    "ip_adapter": "controlnet",
    "lora": "loras",
}
# There is a bundled ControlNet for each kind of control, and a best file.
AUTO_CONTROLNETS = {f"auto ({kind})": kind for kind in catalog.CONTROL_KINDS}
BUNDLED_CONTROLNETS = {f"tiny {kind} (bundled)": kind for kind in catalog.CONTROL_KINDS}


def choices(stage: str) -> list[str]:
    """The entries of a loader's list: `auto`, the bundled file, then the names in the stage's model folders."""
    names = dict.fromkeys(name for folder in catalog.STAGE_FOLDERS[stage] for name in runtime.model_files(folder))
    if stage == "controlnet":
        return [*AUTO_CONTROLNETS, *BUNDLED_CONTROLNETS, *names]
    # What a LoRA is for does not show in the file, so there is no best one.
    return [BUNDLED, *names] if stage == "lora" else [AUTO, BUNDLED, *names]


def checkpoint_choices() -> list[str]:
    """The same for combined checkpoints."""
    return [AUTO, BUNDLED, *runtime.model_files("checkpoints")]


def find(stage: str, choice: str) -> ModelFile:
    """The file that a loader's choice stands for; ValueError where there is none.

    A name that several folders have is the file of the folder that is listed first.
    """
    if stage == "controlnet":
        if choice in AUTO_CONTROLNETS:
            return _present(catalog.best(stage, _files_of, AUTO_CONTROLNETS[choice]), stage)
        if choice in BUNDLED_CONTROLNETS:
            return _present(catalog.bundled(stage, BUNDLED_CONTROLNETS[choice]), stage)
    elif choice == AUTO and stage != "lora":
        return _present(catalog.best(stage, _files_of), stage)
    elif choice == BUNDLED:
        return _present(catalog.bundled(stage), stage)
    folders = catalog.STAGE_FOLDERS[stage]
    folder = next((folder for folder in folders if choice in runtime.model_files(folder)), folders[0])
    return ModelFile(choice, runtime.model_path(folder, choice))


def find_in_checkpoint(main: str, others: tuple[str, ...], choice: str) -> dict[str, ModelFile]:
    """The file of each of several stages, for a choice from `checkpoint_choices`.

    `auto` is the best combined checkpoint that holds all of them, else the bundled family.
    """
    stages = (main, *others)
    if choice == AUTO:
        found = catalog.best_checkpoint(main, others, _files_in("checkpoints"))
        if found is not None:
            return dict.fromkeys(stages, found)
    if choice in (AUTO, BUNDLED):
        return {stage: _present(catalog.bundled(stage), stage) for stage in stages}
    return dict.fromkeys(stages, ModelFile(choice, runtime.model_path("checkpoints", choice)))


def embeddings() -> list[ModelFile]:
    """The textual-inversion files."""
    return _files_in("embeddings")


def _present(file: ModelFile, stage: str) -> ModelFile:
    if file.name == BUNDLED and not os.path.isfile(file.path):
        what = os.path.splitext(os.path.basename(file.path))[0]
        raise ValueError(
            f"No {what} file was found and this installation lacks the bundled tiny one: put a published {what} "
            f"file into models/{WHERE[stage]}, or install the package again with tiny/weights."
        )
    return file


def _files_of(stage: str) -> list[ModelFile]:
    return [file for folder in catalog.STAGE_FOLDERS[stage] for file in _files_in(folder)]


def _files_in(folder: str) -> list[ModelFile]:
    found = []
    for name in runtime.model_files(folder):
        # ComfyUI lists links whose file is gone too; they must not make `auto` fail.
        with contextlib.suppress(ValueError):
            found.append(ModelFile(name, runtime.model_path(folder, name)))
    return found
