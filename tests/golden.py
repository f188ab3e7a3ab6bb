"""Reading the golden files and building the modules behind them."""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"


def _load_fill():
    spec = importlib.util.spec_from_file_location("golden_fill", DATA / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill_module = _load_fill().fill_module


def read_golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a golden file and its metadata, with the JSON in it decoded."""
    with safe_open(str(DATA / "golden" / f"{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata() or {}
    decoded = {key: json.loads(value) for key, value in metadata.items() if key != "note"}
    return tensors, decoded


def build(cls: type[torch.nn.Module], metadata: dict) -> torch.nn.Module:
    """The module of a golden file, filled with its reproducible weights."""
    return fill_module(cls(**metadata.get("config", {})), metadata["seed"]).eval()


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """Largest difference over the largest golden value."""
    assert ours.shape == golden.shape
    return ((ours - golden).abs().max() / golden.abs().max()).item()
