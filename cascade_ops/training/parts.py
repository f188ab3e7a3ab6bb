"""The models that a run starts from, loaded when they are first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..catalog import AUTO, ModelFile, best
from ..float16 import refuse_rescaled
from ..handles import StageHandle, load_stage
from ..pipeline import model_files
from .settings import Models

# Small, and everything that is learned goes by what they say: the rounding of bfloat16 would be in every latent.
_ALWAYS_FLOAT32 = ("latent_encoder", "stage_a", "previewer", "image_encoder")


class Parts:
    """Loads the files that `Models` names; `given` are handles that are there already, by stage.

    Raises ValueError for a given handle with weights of 8 bits, or rescaled for float16.

    frozen_dtype: of Stages C and B and the text encoder where they only run, ``float32`` or ``bfloat16``. The small
    encoders are float32, and so are weights to be trained, whatever the file holds.
    """

    def __init__(
        self,
        models: Models | None = None,
        given: Mapping[str, StageHandle] | None = None,
        frozen_dtype: str = "float32",
    ):
        self.models = models or Models()
        self.frozen_dtype = frozen_dtype
        self._handles = dict(given or {})
        for handle in self._handles.values():
            refuse_rescaled(handle.module, handle.title, "training")
            if handle.weights:
                raise ValueError(
                    f"{handle.title} was given to train with, expected float weights, which can be changed by small "
                    "amounts: load it as auto, bfloat16 or float32."
                )
        self._given = set(self._handles)

    def path(self, stage: str) -> Path:
        """The file of a stage: the one that the settings name, or what ``auto`` finds."""
        return Path(self._file(stage).path)

    def dtype_of(self, stage: str) -> str:
        """What a stage that only runs is loaded as: ``float32`` or ``bfloat16``."""
        return "float32" if stage in _ALWAYS_FLOAT32 else self.frozen_dtype

    def load(self, stage: str, *, trained: bool = False) -> StageHandle:
        """The stage on the CPU, in evaluation mode, the same handle at every call.

        trained: the caller trains these weights: a float32 copy of its own, which later calls do not see.

        Raises:
            ValueError: no such file, or one that holds something else; see `handles.load_stage`.
        """
        if trained and stage in self._given:
            return _own_copy(self._handles[stage])
        if trained:
            return self._load(stage, "float32")
        if stage not in self._handles:
            self._handles[stage] = self._load(stage, self.dtype_of(stage))
        return self._handles[stage]

    def _load(self, stage: str, dtype: str) -> StageHandle:
        file = self._file(stage)
        return load_stage(file.path, stage, dtype=dtype, name=file.name)

    def _file(self, stage: str) -> ModelFile:
        wanted = getattr(self.models, stage)
        if wanted == AUTO:
            return best(stage, model_files(AUTO))
        return ModelFile(Path(wanted).name, wanted)


def _own_copy(handle: StageHandle) -> StageHandle:
    """The handle with its own float32 weights, outside of inference mode, where a host may have loaded the first."""
    import copy
    from dataclasses import replace

    with torch.inference_mode(False):
        module = copy.deepcopy(handle.module)
        network = module if isinstance(module, torch.nn.Module) else module.module
        for parameter in network.parameters():
            parameter.data = parameter.data.clone().float()
        return replace(handle, module=module)
