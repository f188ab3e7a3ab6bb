"""The kinds of control: what each ControlNet reads, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ControlKind:
    """One kind of control.

    channels: of the control, in the release. bottleneck: of its ControlNet. needs: what a control is made of:
    ``picture``, ``mask``, ``latent_encoder``, ``faces``. compression: pixels of the control picture per cell of what
    the ControlNet reads is 1 where it reads pixels and 32 where it reads a map. guidance: what the reference samples
    with; None is Stage C's own.
    """

    name: str
    title: str
    channels: int
    bottleneck: str
    needs: tuple[str, ...]
    compression: int
    guidance: float | None = None


CONTROL_KINDS = {
    kind.name: kind
    for kind in (
        ControlKind("canny", "edges", 1, "effnet", ("picture",), 1),
        ControlKind("inpainting", "inpainting and outpainting", 4, "effnet", ("picture", "mask"), 1),
        ControlKind("super_resolution", "super-resolution", 16, "large", ("picture", "latent_encoder"), 32, 1.0),
        ControlKind("identity", "face identity", 512, "simple", ("faces",), 32),
    )
}
