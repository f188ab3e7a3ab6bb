"""Low-rank adaptation that is being trained: the weights of a frozen network, each with a small change of its own.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), in the form of the reference
(``modules/lora.py`` in Stability-AI/StableCascade), which changes attention's query, key and value together; DoRA: Liu
et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapters.changes import rescaled, sizes
from ..adapters.dialects.fusing import fuse
from ..adapters.dialects.reference import adaptable, walked
from ..adapters.lora import LoRAWeights
from ..adapters.names import FUSED, layer_of
from .settings import LoRA as LoRASettings


class LoRALayer(nn.Module):
    """The change of one weight, as a parametrization of it: ``W + alpha / r * up @ down``, with DoRA at learned sizes.

    As in the reference, `down` starts at zero and `up` with unit normal numbers, so that the first change is zero and
    `down` learns from the first step at a speed that does not depend on the width; with the usual random `down` and
    `up` at zero, an alpha of 1 would want a learning rate a hundred times as high. With DoRA there is one size per
    input, and for attention's fused weight one for each of query, key and value, so that the change can be written by
    thirds; sizes are taken as constants on the way back, as its authors advise.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, thirds: int, dora: bool, generator: torch.Generator):
        super().__init__()
        self.alpha, self.active = alpha, True
        self.down = nn.Parameter(torch.zeros(rank, *weight.shape[1:]))
        self.up = nn.Parameter(torch.randn(len(weight), rank, generator=generator))
        self.dora_scale: nn.Parameter | None = None
        if dora:
            like = torch.empty(thirds, *weight.shape[1:2], *(1,) * (weight.ndim - 2))
            self.dora_scale = nn.Parameter(sizes(weight.detach().float(), like))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, in the dtype of `weight`; the sum is made in float32."""
        if not self.active:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            delta = (self.up @ self.down.flatten(1)).reshape(weight.shape)
            changed = weight.float() + self.alpha / len(self.down) * delta
            if self.dora_scale is not None:
                changed = rescaled(changed, self.dora_scale, sizes(changed.detach(), self.dora_scale))
            return changed.to(weight.dtype)

    def weights(self) -> LoRAWeights:
        """The change as it is now."""
        scale = None if self.dora_scale is None else self.dora_scale.detach().clone()
        return LoRAWeights(self.down.detach().clone(), self.up.detach().clone(), self.alpha, scale)

    @torch.no_grad()
    def start_from(self, name: str, change: LoRAWeights) -> None:
        """Go on with `change`.

        Raises:
            ValueError: another rank or shape, or DoRA on one side only.
        """
        found = [tuple(change.down.shape), tuple(change.up.shape)]
        expected = [tuple(self.down.shape), tuple(self.up.shape)]
        if found != expected:
            raise ValueError(
                f"The LoRA to go on with has '{name}' as {list(found[0])} and {list(found[1])}, expected "
                f"{list(expected[0])} and {list(expected[1])}: set its own rank and base model."
            )
        if (change.dora_scale is None) != (self.dora_scale is None):
            raise ValueError(
                f"The LoRA to go on with {'has no' if change.dora_scale is None else 'has'} DoRA sizes and the run is "
                "set otherwise: change 'dora'."
            )
        self.down.copy_(change.down)
        self.up.copy_(change.up * (change.alpha / self.alpha))
        if self.dora_scale is not None and change.dora_scale is not None:
            self.dora_scale.copy_(change.dora_scale.expand_as(self.dora_scale))


@contextmanager
def switched_off(layers: Iterable[LoRALayer]) -> Iterator[None]:
    """The frozen network as it was without `layers`, inside the block."""
    layers = list(layers)
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def private_copy(network: nn.Module) -> nn.Module:
    """The network with parameters of its own over the same memory, frozen: moving or parametrizing it leaves the
    original as it was. Weights that were made in inference mode, which autograd refuses, are copied."""
    with torch.inference_mode(False):
        memo: dict[int, object] = {}
        for parameter in network.parameters():
            data = parameter.clone() if parameter.is_inference() else parameter.detach()
            memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
        for buffer in network.buffers():
            memo[id(buffer)] = buffer.clone()
        return copy.deepcopy(network, memo)


def add_lora(
    network: nn.Module,
    settings: LoRASettings,
    seed: int = 0,
    start: Mapping[str, LoRAWeights] | None = None,
) -> dict[str, LoRALayer]:
    """Give the weights that `settings.modules` reaches a trainable change; name of the weight -> its layer.

    network: a frozen Stage C of any float dtype, which is changed (see `private_copy`); its own weights stay as they
    are. seed: of the random start. start: changes to go on with; the weights without one start anew.

    Raises:
        ValueError: the filters reach nothing, or `start` does not fit; see `LoRALayer.start_from`.
    """
    shapes = adaptable(network)
    names = walked(shapes, settings.modules)
    if not names:
        raise ValueError(_reaches_nothing(settings.modules, list(shapes)))
    if settings.rank < 1:
        raise ValueError(f"The LoRA's rank is {settings.rank}, expected at least 1.")
    start = fuse(start or {})
    unknown = sorted(start.keys() - set(names))
    if unknown:
        raise ValueError(
            f"The LoRA to go on with changes '{unknown[0]}' ({len(unknown)} weights) that the modules "
            f"{', '.join(map(repr, settings.modules))} do not reach: set the modules that it was trained with."
        )
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        module, leaf = network.get_submodule(layer_of(name)), name.rpartition(".")[2]
        weight = getattr(module, leaf)
        thirds = 3 if leaf == FUSED else 1
        layer = LoRALayer(weight, settings.rank, settings.alpha, thirds, settings.dora, generator)
        if name in start:
            layer.start_from(name, start[name])
        layer.to(weight.device)
        # The check would call the layer and compare dtypes, which agree.
        parametrize.register_parametrization(module, leaf, layer, unsafe=True)
        layers[name] = layer
    return layers


def _reaches_nothing(modules: Sequence[str], names: Sequence[str]) -> str:
    parts = sorted({part for name in names for part in layer_of(name).split(".") if not part.isdigit()})
    return (
        f"The LoRA modules {', '.join(map(repr, modules)) or 'are none and'} reach no layer of this Stage C, expected "
        f"parts of its layers' names, which are made of {', '.join(parts)} and numbers, such as "
        f"'{layer_of(names[0])}': correct them, or take an empty string for all layers."
    )
