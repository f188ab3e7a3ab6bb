"""A world in which a picture says everything about a latent, and a small Stage C that knows that world."""

import functools

import torch

from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file, save
from stable_cascade_nodes.cascade_ops.control import Faces, write_faces
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.models import LatentEncoder, StageC
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.objective import StepResult
from stable_cascade_nodes.cascade_ops.training.settings import ControlNetSettings, Data, Loss, Models, Settings
from stable_cascade_nodes.cascade_ops.training.stage_c_loss import StageCLoss, empty_prompt

BATCH, EMBEDDING = 16, 6
_TEXT = inspect_file(bundled("text_encoder").path).config
WIDTHS = {"c_clip_text": _TEXT["hidden_size"], "c_clip_text_pooled": _TEXT["projection_dim"], "c_clip_img": 8}
STAGE_C = {
    "c_in": 4, "c_out": 4, "c_cond": 16, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
    "dropout": [0.0, 0.0], **WIDTHS,
}  # fmt: skip
ENCODER = {"c_latent": 4, "widths": [8, 8, 8, 8, 8, 8, 8, 16], "depths": [1, 1, 1, 1, 1, 1]}
LOSS = Loss(weight="constant", offset_noise=0.1, shift=4.0)


def world(seed, count=BATCH):
    """A batch in which boxes stand left, right, on both sides or nowhere, and where ``[B, 2]``; a latent says it."""
    random = torch.Generator().manual_seed(seed)
    there = torch.randint(2, (count, 2), generator=random)
    image = torch.zeros(count, 3, 64, 64) + 0.2 * torch.rand(count, 3, 1, 1, generator=random)
    for picture, sides in zip(image, there, strict=True):
        for left in (32 * side + 6 for side in range(2) if sides[side]):
            picture[:, 8:56, left : left + 20] = 0.8 + 0.2 * torch.rand(3, 1, 1, generator=random)
    latent = (2.0 * there - 1)[:, None, None, :] * torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None, None]
    latent = latent.expand(-1, -1, 2, -1) + 0.02 * torch.randn(count, 4, 2, 2, generator=random)
    batch = {
        "image": image,
        "stage_c_latent": latent,
        "text": no_text().hidden.expand(count, -1, -1),
        "text_pooled": no_text().pooled.reshape(1, 1, -1).expand(count, -1, -1),
        "image_embedding": torch.zeros(count, 1, WIDTHS["c_clip_img"]),
        "name": [f"{left} {right}.png" for left, right in there.tolist()],
    }
    return batch, there


def settings(folder, kind, **more):
    models = Models(
        stage_c=str(folder / "stage_c.safetensors"),
        latent_encoder=str(folder / "encoder.safetensors"),
        text_encoder=bundled("text_encoder").path,
        init=more.pop("init", "none"),
    )
    control = ControlNetSettings(kind, str(folder / "faces.safetensors") if kind == "identity" else "")
    data = Data(resolution=85, caption_dropout=0.0)  # latents of 2 x 2
    return Settings("controlnet", str(folder), models=models, controlnet=control, data=data, loss=LOSS, **more)


def write_world(folder):
    """The files of that world: a trained Stage C, an encoder whose latents differ by picture, two persons' faces."""
    torch.manual_seed(0)
    stage_c, encoder = StageC(**STAGE_C), LatentEncoder(**ENCODER)
    loss = StageCLoss(settings(folder, "canny"), no_text(), WIDTHS["c_clip_img"])
    # Neither is trained to its end: a Stage C that is quite sure of itself takes many more steps to steer.
    train(list(stage_c.parameters()), lambda batch, draws: _stage_c_loss(stage_c, loss, batch, draws), 200, 4e-3, 4e-3)
    train(list(encoder.parameters()), lambda batch, draws: _encoder_loss(encoder, batch), 60, 1e-2, 1e-2)
    save(stage_c, folder / "stage_c.safetensors", stage="stage_c", config=STAGE_C)
    save(encoder, folder / "encoder.safetensors", stage="latent_encoder", config=ENCODER)
    vectors = torch.randn(2, 1, EMBEDDING, generator=torch.Generator().manual_seed(2))
    boxes = torch.tensor([[4.0, 4.0, 30.0, 60.0], [36.0, 4.0, 60.0, 60.0]])
    pairs = {f"{a} {b}": Faces(boxes, torch.cat([vectors[a], vectors[b]]), 64, 64) for a in (0, 1) for b in (0, 1)}
    write_faces(folder / "faces.safetensors", pairs)


@functools.cache
def no_text():
    """The empty prompt: no word says anything about this world."""
    return empty_prompt(load_stage(bundled("text_encoder").path, "text_encoder"))


def _stage_c_loss(stage_c, loss, batch, draws):
    conditions = loss.conditions(batch, draws)
    return loss.loss(lambda x, r: stage_c(x, r, *conditions), batch["stage_c_latent"], draws)


def _encoder_loss(encoder, batch):
    encoded = encoder(normalize_imagenet(batch["image"]))
    return StepResult((encoded - batch["stage_c_latent"]).square().mean())


def train(parameters, loss, steps, rate, last_rate=0.0):
    """The losses of `steps` steps of Adam, its rate falling to `last_rate` along a cosine; step n sees ``world(n)``."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, last_rate)
    losses = []
    for step in range(steps):
        result = loss(world(step)[0], Draws(0, step, range(BATCH)))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        falling.step()
        losses.append(result.loss.item())
    return losses
