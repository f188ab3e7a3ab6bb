"""The cases of starting: reading a model from disk, and importing the libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..cascade_ops.checkpoints import load, save
from .comparing import Sides
from .diffusers_models import diffusers_class, diffusers_model, diffusers_weights
from .models import CONFIGS, random_stage
from .stage_cases import Setting

_PAGE_BYTES = 4096
_ROOT = Path(__file__).resolve().parents[1]

# The time of the import alone, over torch that is there already; printed in seconds.
_TIMED = "import time, torch; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
_THIS_PACK = """import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "stable_cascade_nodes", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}]
)
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
import time, torch
start = time.perf_counter()
spec.loader.exec_module(module)
{more}
print(time.perf_counter() - start)"""


def load_file(stage: str, size: str, setting: Setting) -> Sides:
    """A single file in the published layout: our `load` against diffusers' ``from_single_file``.

    diffusers reads the configuration from a folder that is given to it, since it would fetch it otherwise.
    """
    path, folder = _saved(stage, size, setting)

    def theirs() -> nn.Module:
        return diffusers_class(stage).from_single_file(
            str(path), config=str(folder), torch_dtype=setting.dtype, local_files_only=True
        )

    return _loading(stage, setting, path, lambda: load(path, stage, device=setting.device)[0], theirs)


def load_folder(stage: str, size: str, setting: Setting) -> Sides:
    """A folder as diffusers saves it: our `load` of its file against diffusers' ``from_pretrained``."""
    path, folder = _saved(stage, size, setting)

    def theirs() -> nn.Module:
        return diffusers_class(stage).from_pretrained(str(folder), torch_dtype=setting.dtype, local_files_only=True)

    return _loading(stage, setting, path, lambda: load(folder, stage, device=setting.device)[0], theirs)


# What a picture needs beside the pack itself, which imports it only then.
FOR_PICTURES = """import stable_cascade_nodes.cascade_ops.pipeline, stable_cascade_nodes.cascade_ops.text
from transformers import CLIPTextModelWithProjection"""


def importing(more: str, note: str, setting: Setting) -> Sides:
    """This pack, and the modules that `more` imports, against diffusers' two pipelines; each in a fresh process that
    has torch already."""

    def seconds(code: str) -> float:
        answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        return float(answer.split()[-1])

    pipelines = "from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline"
    return Sides(
        (lambda: seconds(_THIS_PACK.format(root=str(_ROOT), more=more))) if setting.wants("ours") else None,
        (lambda: seconds(_TIMED.format(pipelines))) if setting.wants("theirs") else None,
        counted=False,
        seconds=True,
        difference=lambda ours, theirs: 0.0,
        notes=[note, "two libraries of different content, nothing to agree on"],
    )


def _saved(stage: str, size: str, setting: Setting) -> tuple[Path, Path]:
    """A model with random weights in both layouts: a single file, and a folder; written below the setting's folder
    where they are not there yet."""
    size = "small" if setting.quick else size
    path = Path(setting.folder) / f"{stage}_{size}.safetensors"
    folder = path.with_suffix("")
    if not folder.exists():
        module, config = random_stage(stage, size, dtype=setting.dtype), CONFIGS[stage][size]
        save(module, path, stage=stage, config=config)
        diffusers_model(stage, config, module.state_dict()).save_pretrained(str(folder))
    return path, folder


def _loading(
    stage: str, setting: Setting, path: Path, ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module]
) -> Sides:
    return Sides(
        (lambda: _read_through(ours())) if setting.wants("ours") else None,
        (lambda: _read_through(theirs().to(setting.device))) if setting.wants("theirs") else None,
        moved=2 * path.stat().st_size,
        tolerance=0.0,
        difference=partial(_unlike, stage),
        counted=False,
        notes=["the file is in the cache of the system; every weight is read once after loading"],
    )


def _read_through(module: nn.Module) -> nn.Module:
    """The module, after a look at each page of its weights: some loaders only map the file."""
    for tensor in module.parameters():
        tensor.flatten()[:: _PAGE_BYTES // tensor.element_size()].sum()
    return module


def _unlike(stage: str, ours: nn.Module, theirs: nn.Module) -> float:
    """0 where all tensors are the same to the last bit, else infinite."""
    expected, found = theirs.state_dict(), diffusers_weights(stage, ours.state_dict())
    same = expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    return 0.0 if same else float("inf")
