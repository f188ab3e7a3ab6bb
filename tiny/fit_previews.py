"""Fit the linear previews of the tiny family: the colour of each latent cell from its channels, by least squares.

python -m stable_cascade_nodes.tiny.fit_previews

Writes the tiny family's maps into `cascade_ops/data/latent_preview.json` and prints the error on other scenes: a colour
is 27.3 of 255 away on average for Stage C and 3.5 for Stage B, where one colour for each picture is 77 and 81 away.
"""

import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cascade_ops.checkpoints import load
from ..cascade_ops.latent_preview import MAPS, PreviewMap
from ..cascade_ops.models.effnet import normalize_imagenet
from .dataset import training_scene
from .drawing import render
from .family import IMAGE_SIZE, WEIGHTS, as_images, encoder_input

_SCENES = 400
# Any but that of the training data, so that nothing was trained on these scenes.
_SEED = 2


def pictures(split: str, count: int) -> Tensor:
    """Drawn pictures ``[N, 3, 256, 256]``, 0..1."""
    return as_images(np.stack([render(training_scene(_SEED, i, split), IMAGE_SIZE) for i in range(count)]))


@torch.inference_mode()
def latents(images: Tensor) -> dict[str, Tensor]:
    """Their latents, by the stage that samples such ones."""
    encoder, _ = load(WEIGHTS / "latent_encoder.safetensors", dtype=torch.float32)
    stage_a, _ = load(WEIGHTS / "stage_a.safetensors", dtype=torch.float32)
    parts = images.split(20)
    return {
        "stage_c": torch.cat([encoder(normalize_imagenet(encoder_input(part))) for part in parts]),
        "stage_b": torch.cat([stage_a.encode(part)[0] for part in parts]),
    }


def cells(values: Tensor) -> Tensor:
    """``[N, C, h, w]`` as rows ``[N h w, C]``."""
    return values.permute(0, 2, 3, 1).flatten(0, 2)


def fit(samples: Tensor, images: Tensor) -> PreviewMap:
    """The map with the least squared error to the pictures, shrunk to one pixel per cell."""
    inputs = F.pad(cells(samples), (0, 1), value=1.0)
    colours = cells(F.interpolate(images, size=samples.shape[-2:], mode="area"))
    solution = torch.linalg.lstsq(inputs.double(), colours.double()).solution.float()
    return PreviewMap(solution[:-1], solution[-1])


def error(found: PreviewMap, samples: Tensor, images: Tensor) -> float:
    """Mean absolute distance of a colour, of 255."""
    wanted = F.interpolate(images, size=samples.shape[-2:], mode="area").permute(0, 2, 3, 1)
    return 255 * (found.colours(samples) - wanted).abs().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    seen, unseen = pictures("train", _SCENES), pictures("held_out", _SCENES // 4)
    others = latents(unseen)
    maps = {}
    for stage, samples in latents(seen).items():
        found = fit(samples, seen)
        maps[stage] = {"weight": _rounded(found.weight), "bias": _rounded(found.bias)}
        print(
            f"{stage}: {error(found, samples, seen):.1f} of 255, other scenes {error(found, others[stage], unseen):.1f}"
        )
    whole = json.loads(MAPS.read_text(encoding="utf-8")) | {"tiny": maps}
    temporary = MAPS.with_suffix(".tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, MAPS)


def _rounded(values: Tensor) -> list:
    return (values * 10_000).round().div(10_000).double().numpy().round(4).tolist()


if __name__ == "__main__":
    main()
