"""How many operators a step asks a GPU for, and how many bytes it copies to it: the figures of
`docs/performance/acceleration.md`.

    python -m stable_cascade_nodes.benchmarks.launches

Networks of published size run without memory, on PyTorch's `meta` device, which computes nothing and, like a GPU,
refuses to tell the host a value: what would wait for the device fails here. Counted are the operators of a whole step
(network, guidance, sampler) that would launch at least one kernel; views and fresh memory are none, attention is one.
Some operators launch several kernels, and some layouts that are copied here need no copy on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cascade_ops.checkpoints.loading import ParametersWithoutMemory
from ..cascade_ops.denoisers import StageBDenoiser, StageCDenoiser, TextCondition
from ..cascade_ops.diffusion import Guidance, StepInfo, image_generators, sample
from ..cascade_ops.models import StageB, StageC

META = torch.device("meta")
_NO_WORK = ("aten::empty", "aten::detach", "aten::_unsafe_view", "aten::new_empty", "aten::alias", "aten::lift_fresh")

_DEPTH_B: dict[str, Any] = {"blocks": [[2, 4, 14, 4], [4, 14, 4, 2]], "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]]}
SIZES: dict[str, Callable[[], StageB | StageC]] = {
    "Stage C 3.6B": lambda: StageC(),
    "Stage C 1B lite": lambda: StageC(c_cond=1536, c_hidden=[1536, 1536], nhead=[24, 24], blocks=[[4, 12], [12, 4]]),
    "Stage B 1.5B": lambda: StageB(),
    "Stage B 700M lite": lambda: StageB(**_DEPTH_B, c_hidden=[320, 576, 1152, 1152], nhead=[-1, 9, 18, 18]),
}


class DeviceWork(TorchDispatchMode):
    """Counts what is asked of the `meta` device inside of it.

    launches: operators by name that would launch a kernel. copies: shapes of what is copied to it. waits: operators
    that need a value of it in main memory, which also fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.copies: list[tuple[int, ...]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        from_device = any(each.device == META for each in given)
        try:
            result = operator(*args, **(kwargs or {}))
        except (RuntimeError, NotImplementedError):
            if from_device:
                self.waits.append(operator.name())
            raise
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.device == META]
        # A value on the host that is a single number travels with the launch.
        hosts = [each for each in given if each.device != META and each.ndim]
        if made and hosts:
            self.copies += [tuple(each.shape) for each in hosts]
        elif made and not _is_view(operator) and not operator.name().startswith(_NO_WORK):
            self.launches[operator.name()] += 1
        elif from_device and not made:
            self.waits.append(operator.name())
        return result


class _OneAttention(TorchFunctionMode):
    """Attention as the single kernel that a GPU has for it; the `meta` device would take it apart."""

    def __init__(self, work: DeviceWork) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self._work.launches["aten::scaled_dot_product_attention"] += 1
        return torch.empty_like(args[0])


def _is_view(operator: Any) -> bool:
    returned = operator._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returned)


class StepWork(NamedTuple):
    """What the second step of a run asked for."""

    launches: Counter[str]
    copies: list[tuple[int, ...]]
    waits: list[str]


class _Enough(Exception):
    """Ends a run before its check of the result, for which the host has to wait."""


def step_work(denoiser: Any, shape: tuple[int, ...], guidance: float = 4.0, sampler: str = "ddpm") -> StepWork:
    """What one step of a run asks of the device, from the end of the first step to the end of the second."""
    found: list[StepWork] = []
    work = DeviceWork()

    def report(info: StepInfo) -> None:
        if info.step == 1:
            found.append(StepWork(work.launches, work.copies, work.waits))
            raise _Enough
        work.launches, work.copies, work.waits = Counter(), [], []

    x = torch.empty(shape, device=META)
    try:
        with work, _OneAttention(work):
            sample(
                denoiser,
                x,
                steps=4,
                sampler=sampler,
                guidance=Guidance(guidance),
                generators=image_generators(0, shape[0]),
                callback=report,
            )
    except _Enough:
        pass
    return found[0]


def _no_network(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of a model's step, where a prediction has the latent's shape."""
    return x


def network(name: str) -> StageB | StageC:
    """A network of published size in bfloat16, without memory."""
    with ParametersWithoutMemory():
        return SIZES[name]().to(META, torch.bfloat16).eval().requires_grad_(False)


def denoiser_of(model: StageB | StageC, tokens: int = 77) -> StageBDenoiser | StageCDenoiser:
    """With conditions that have no values either."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=META)

    if isinstance(model, StageB):
        pooled = empty(1, 1, model.clip_mapper.in_features)
        return StageBDenoiser(model, empty(1, model.effnet_mapper[0].in_channels, 24, 24), pooled, pooled)
    widths = model.clip_txt_mapper.in_features, model.clip_txt_pooled_mapper.in_features
    text = TextCondition(empty(1, tokens, widths[0]), empty(1, 1, widths[1]))
    return StageCDenoiser(model, text, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="list the operators too")
    arguments = parser.parse_args()
    print("| model | guided | operators | outside the network | copied to the device | waits |")
    print("|---|---|---|---|---|---|")
    for name in SIZES:
        denoiser = denoiser_of(network(name))
        shape = (1, 16, 24, 24) if "C" in name.split()[1] else (1, 4, 256, 256)
        for guidance in (4.0, 1.0):
            work = step_work(denoiser, shape, guidance)
            copied = sum(4 * torch.Size(each).numel() for each in work.copies)
            guided = "yes" if guidance != 1 else "no"
            around = step_work(replace(denoiser, step=_no_network), shape, guidance).launches.total()
            counts = f"{work.launches.total()} | {around} | {copied} bytes | {len(work.waits)}"
            print(f"| {name} | {guided} | {counts} |", flush=True)
            if arguments.names:
                for operator, count in work.launches.most_common():
                    print(f"    {count:5} {operator}")


if __name__ == "__main__":
    main()
