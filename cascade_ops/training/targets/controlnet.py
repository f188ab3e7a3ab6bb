"""ControlNets for Stage C: canny, inpainting and outpainting, super-resolution, face identity.

Stage C stays as it is; the ControlNet learns to help it predict the noise of latents whose picture it is shown. Source:
the reference's ``train/train_c_controlnet.py`` and ``configs/training/controlnet_c_3b_*.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints import load, save
from ...checkpoints.errors import shown
from ...control import (
    CONTROL_KINDS,
    ControlKind,
    Faces,
    canny_control,
    control_picture,
    faces_of,
    identity_control,
    inpainting_control,
    random_masks,
    read_faces,
    smaller_picture,
    super_resolution_control,
)
from ...denoisers import SteppedControl
from ...handles import StageHandle
from ...models import ControlNet, LatentEncoder, StageC
from ...models.controlnet import residual_blocks
from ...sizes import stage_c_size
from ..draws import Draws
from ..frozen import frozen_copy
from ..memory_saving import checkpoint_blocks
from ..new_controlnet import check_blocks, new_controlnet, stage_c_width
from ..objective import Batch, Objective, StepResult
from ..parts import Parts
from ..settings import Settings
from ..stage_c_loss import StageCLoss, empty_prompt
from ..stage_c_samples import StageCSampler


class ControlNetObjective(Objective):
    """Trains a ControlNet through a frozen Stage C of any dtype.

    The control is made from each sample's picture as it is made when sampling: at three quarters of the picture's size,
    canny edges of it, it with a random hole, the latent of it at half size; or from its faces. The picture encoder's
    batch norms stay in evaluation mode: their statistics are the latent encoder's, so that a sample depends on no other
    one and training sees what sampling will see. Stage C is in evaluation mode too, without dropout.

    encoder: for super-resolution. faces: for identity, of each picture by name.
    """

    def __init__(
        self,
        controlnet: ControlNet,
        stage_c: StageC,
        kind: ControlKind,
        loss: StageCLoss,
        sampler: StageCSampler,
        config: dict,
        base: str,
        name: str | None = None,
        encoder: LatentEncoder | None = None,
        faces: Mapping[str, Faces] | None = None,
    ):
        super().__init__()
        self.controlnet, self.kind, self.loss, self.sampler = controlnet, kind, loss, sampler
        self.config, self.base, self.name, self.faces = config, base, name, faces
        # In a list: frozen parts are neither saved nor spread over devices with what is trained.
        self._frozen: list[nn.Module | None] = [stage_c.eval(), encoder.eval() if encoder else None]
        pictures = {"image_embedding"} if loss.reads_pictures else set()
        shown = {"name", "image"} if kind.name == "identity" else {"image"}
        self.needs = frozenset({"stage_c_latent", "text", "text_pooled"} | pictures | shown)
        self.train()

    @property
    def stage_c(self) -> StageC:
        """The frozen model."""
        return self._frozen[0]  # type: ignore[return-value]

    def train(self, mode: bool = True) -> ControlNetObjective:
        """Training mode for all but batch norms."""
        super().train(mode)
        for module in self.controlnet.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def control(self, batch: Batch, draws: Draws) -> Tensor:
        """What the ControlNet reads of a batch, ``[B, C, 32 h, 32 w]``, or ``[B, C, h, w]`` for maps."""
        height, width = batch["stage_c_latent"].shape[-2:]
        if self.kind.name == "identity":
            return self._identity(batch, height, width)
        picture = control_picture(batch["image"], height, width)
        mask = random_masks(draws, *picture.shape[-2:]) if self.kind.name == "inpainting" else None
        return self._from_picture(picture, mask)

    def _from_picture(self, picture: Tensor, mask: Tensor | None) -> Tensor:
        self._move(picture.device)
        with torch.no_grad(), torch.autocast(picture.device.type, enabled=False):
            if self.kind.name == "canny":
                return canny_control(picture)
            if mask is not None:
                return inpainting_control(picture, mask.to(picture.device))
            encoder: LatentEncoder = self._frozen[1]  # type: ignore[assignment]
            return super_resolution_control(encoder, smaller_picture(picture))

    def _identity(self, batch: Batch, height: int, width: int) -> Tensor:
        rows, columns = batch["image"].shape[-2:]
        faces = [faces_of(self.faces or {}, name).cropped(columns, rows) for name in batch["name"]]
        control = identity_control(faces, 32 * height, 32 * width, self.config["c_in"])
        return control.to(batch["image"].device)

    def _move(self, device: torch.device) -> None:
        self._frozen = [None if module is None else module.to(device) for module in self._frozen]

    def forward(self, batch: Batch, draws: Draws) -> StepResult:
        self._move(batch["stage_c_latent"].device)
        conditions = self.loss.conditions(batch, draws)
        residuals = self.controlnet(self.control(batch, draws))
        return self.loss.loss(
            lambda x, r: self.stage_c(x, r, *conditions, control=residuals),
            batch["stage_c_latent"],
            draws,
            batch.get("loss_weight"),
        )

    def export(self, folder: Path, name: str) -> list[Path]:
        control = {"kind": self.kind.name, "base": self.base}
        path = save(
            self.controlnet,
            folder / f"{name}.safetensors",
            stage="controlnet",
            config=self.config,
            name=self.name,
            metadata={"cascade.control": json.dumps(control)},
        )
        return [path]

    @torch.no_grad()
    def sample(self, prompts: list[str], pictures: list[Tensor], seed: int, steps: int) -> Tensor | None:
        """Latents of `prompts` with the control of `pictures`, ``[3, H, W]`` 0..1, one for all or one each.

        For inpainting the middle of a picture is masked. None without pictures, and for identity, which needs faces.

        Raises:
            ValueError: another number of pictures.
        """
        if not pictures or self.kind.name == "identity":
            return None
        if len(pictures) not in (1, len(prompts)):
            raise ValueError(
                f"There are {len(pictures)} sample pictures for {len(prompts)} prompts, expected one for all or one "
                "each: change samples.pictures."
            )
        size = stage_c_size(self.sampler.side, self.sampler.side)
        device = next(self.controlnet.parameters()).device
        picture = torch.cat([control_picture(_square(one)[None].to(device), *size) for one in pictures])
        mask = _middle(picture) if self.kind.name == "inpainting" else None
        residuals = self.controlnet(self._from_picture(picture, mask))
        return self.sampler(self.stage_c, prompts, seed, steps, controls=[SteppedControl(residuals)])


def _square(picture: Tensor) -> Tensor:
    """The middle of a picture ``[3, H, W]``."""
    height, width = picture.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[:, top : top + side, left : left + side]


def _middle(picture: Tensor) -> Tensor:
    """A mask ``[1, 1, H, W]`` of the middle quarter."""
    height, width = picture.shape[-2:]
    mask = picture.new_zeros(1, 1, height, width)
    mask[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    return mask


def build(settings: Settings, parts: Parts) -> ControlNetObjective:
    """A ControlNet from `models.init`, or a new one whose picture encoder starts from the latent encoder.

    Raises:
        ValueError: no such kind; faces that are missing or cannot follow a random crop; a file of another kind or for
            another Stage C; arguments that a ControlNet does not have.
    """
    kind = _kind(settings.controlnet.kind)
    handle = parts.load("stage_c")
    stage_c: StageC = frozen_copy(handle.module)
    checkpoint_blocks(stage_c, settings.gradient_checkpointing)
    faces = _faces(settings) if kind.name == "identity" else None
    encoder = None
    if "latent_encoder" in kind.needs or (kind.bottleneck == "effnet" and settings.models.init == "none"):
        encoder = frozen_copy(parts.load("latent_encoder").module)
    if settings.models.init == "none":
        torch.manual_seed(settings.seed)
        controlnet, config = new_controlnet(kind, stage_c, settings.network, encoder, _embedding_width(faces))
    else:
        controlnet, config = _from_file(settings, kind, handle, _embedding_width(faces))
    text_encoder = parts.load("text_encoder")
    loss = StageCLoss(settings, empty_prompt(text_encoder), stage_c.clip_img_mapper.in_features)
    sampler = StageCSampler(text_encoder, settings, handle.info.defaults)
    # The name tells which family a file belongs to.
    name = handle.info.size if handle.family == "tiny" else settings.name or None
    return ControlNetObjective(
        controlnet.requires_grad_(True),
        stage_c,
        kind,
        loss,
        sampler,
        config,
        handle.info.size,
        name,
        encoder if "latent_encoder" in kind.needs else None,
        faces,
    )


def _kind(name: str) -> ControlKind:
    if name not in CONTROL_KINDS:
        raise ValueError(f"The kind of control is {name!r}, expected one of {', '.join(CONTROL_KINDS)}.")
    return CONTROL_KINDS[name]


def _from_file(
    settings: Settings, kind: ControlKind, handle: StageHandle, embedding_width: int | None
) -> tuple[ControlNet, dict]:
    """The ControlNet to go on with, in float32."""
    if settings.network:
        raise ValueError(
            "network describes a new ControlNet and models.init names a file to go on with, expected one of them: "
            "remove the other."
        )
    controlnet, info = load(Path(settings.models.init), "controlnet", dtype=torch.float32)
    found, file = info.control.get("kind"), shown(info.path)
    if found is not None and found != kind.name:
        raise ValueError(f"{file} is a ControlNet for {found}, expected {kind.name}: change controlnet.kind or init.")
    width = stage_c_width(handle.module)
    if info.config["c_proj"] != width:
        raise ValueError(
            f"{file} steers a Stage C {info.config['c_proj']} wide and {handle.title} is {width} wide: choose the "
            "Stage C that it belongs to."
        )
    if embedding_width is not None and info.config["c_in"] != embedding_width:
        raise ValueError(
            f"{file} reads face embeddings of {info.config['c_in']} numbers and the file of embeddings has "
            f"{embedding_width}: use the face recognition model that it was trained with."
        )
    check_blocks(info.config["proj_blocks"], residual_blocks(handle.module))
    return controlnet, info.config


def _faces(settings: Settings) -> dict[str, Faces]:
    """The faces of the run's pictures."""
    if not settings.controlnet.embeddings:
        raise ValueError(
            "Training a ControlNet for identity needs faces and controlnet.embeddings is empty, expected a file of "
            "face boxes and embeddings per picture: name it."
        )
    if settings.data.crop != "centre":
        raise ValueError(
            f"Pictures are cropped {settings.data.crop!r} and the faces' boxes are of whole pictures, expected "
            "'centre' for identity: set data.crop to centre."
        )
    return read_faces(settings.controlnet.embeddings)


def _embedding_width(faces: Mapping[str, Faces] | None) -> int | None:
    """How many numbers an embedding has; None without faces."""
    if faces is None:
        return None
    widths = {found.embeddings.shape[1] for found in faces.values() if len(found.boxes)}
    if len(widths) != 1:
        raise ValueError(
            f"The face embeddings have {' and '.join(map(str, sorted(widths))) or 'no'} numbers, expected one length "
            "for all: make them with one face recognition model."
        )
    return widths.pop()
