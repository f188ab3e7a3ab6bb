"""Train the tiny Stage A.

python -m stable_cascade_nodes.tiny.train_stage_a --out DIR
"""

import numpy as np
import torch

from ..cascade_ops.models import StageA
from ..cascade_ops.training.loop import LoopConfig, Trainer
from ..cascade_ops.training.stage_a import autoencoder_loss, fit_codebook, normalize_latent
from .family import STAGE_A, as_images
from .pool import open_pool
from .publish import save_part
from .recipe import log, parse

CROP = 64
BATCH = 12
LATENT_NOISE = 0.03


def random_crops(pictures: np.ndarray, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random crops of random pictures, ``[count, 3, CROP, CROP]``."""
    index = torch.randint(len(pictures), (count,), generator=generator).tolist()
    corner = torch.randint(pictures.shape[1] - CROP + 1, (count, 2), generator=generator).tolist()
    return as_images(
        np.stack([pictures[i, y : y + CROP, x : x + CROP] for i, (y, x) in zip(index, corner, strict=True)])
    )


@torch.no_grad()
def reconstruction_psnr(model: StageA, pictures: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of whole pictures in dB."""
    values = []
    for start in range(0, len(pictures), 16):
        images = as_images(pictures[start : start + 16])
        decoded = model.decode(model.encode(images)[0]).clamp(0, 1)
        values.append(-10 * (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-9).log10())
    return torch.cat(values).mean().item()


def main(arguments: list[str] | None = None) -> None:
    given = parse("Train the tiny Stage A.", 7000, arguments)
    pictures, _ = open_pool(given.pool, "train")
    test, _ = open_pool(given.pool, "test")
    torch.manual_seed(0)
    model = StageA(**STAGE_A).to(given.device).eval()
    # The published gates start at zero, which would leave the mixing blocks out; small values let them learn.
    for name, parameter in model.named_parameters():
        if name.endswith("gammas"):
            torch.nn.init.constant_(parameter, 0.1)

    def loss(step: int, generator: torch.Generator):
        images = random_crops(pictures, BATCH, generator).to(given.device)
        noise = torch.randn(BATCH, model.c_latent, CROP // 4, CROP // 4, generator=generator) * LATENT_NOISE
        return autoencoder_loss(model, images, noise.to(given.device) / model.scale_factor)

    trainer = Trainer(model, loss, LoopConfig(given.steps, lr=3e-3), given.out / "stage_a.run.safetensors")
    trainer.run(log=log)
    with trainer.averaged():
        model.cpu()
        generator = torch.Generator().manual_seed(1)
        sample = as_images(pictures[:256])
        normalize_latent(model, sample)
        fit_codebook(model, sample, generator)
        log(f"psnr on {len(test[:200])} test pictures: {reconstruction_psnr(model, test[:200]):.2f} dB")
        save_part(model, given.out / "stage_a.safetensors", "stage_a", STAGE_A)


if __name__ == "__main__":
    main()
