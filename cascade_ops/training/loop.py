"""The training loop that every part of the chain shares: seeded, resumable, with averaged weights.

A run depends on its seed alone. The random numbers of step ``n`` come from a generator seeded with the run's seed and
``n``, so a run that was stopped and resumed draws what an uninterrupted one would have drawn.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run.

    Attributes:
        steps: optimiser steps of the whole run.
        lr: peak learning rate of AdamW; linear warm-up over ``warmup`` steps, then a cosine down to zero.
        weight_decay: decoupled weight decay, on tensors of two or more dimensions only.
        ema_decay: decay of the weight average per step; 0 switches it off.
        grad_clip: largest norm of the gradient.
        seed: seed of everything that is drawn.
        autocast: bfloat16 autocast of the loss (weights stay float32).
        log_every, save_every: steps between log lines and between checkpoints.
    """

    steps: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    grad_clip: float = 1.0
    seed: int = 0
    autocast: bool = False
    log_every: int = 100
    save_every: int = 1000


# Given the step and its generator, returns the loss and figures for the log.
LossFunction = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


class Stateful(Protocol):
    """Something with tensors that a resumed run needs back."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def learning_rate(step: int, config: LoopConfig) -> float:
    """The learning rate of a step: warm-up, then cosine to zero (Loshchilov and Hutter, "SGDR", 2017)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of one step of a run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class Trainer:
    """Trains the parameters of a module that need a gradient.

    Args:
        module: what is trained; buffers are saved with it.
        loss: see ``LossFunction``; calls the module itself.
        config: settings of the run.
        checkpoint: file that the run is saved to and resumed from (safetensors).
        state: what else belongs to the run (the adaptive loss weight); saved and resumed with it.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        config: LoopConfig,
        checkpoint: Path,
        state: Stateful | None = None,
    ):
        self.module, self.loss, self.config, self.checkpoint = module, loss, config, Path(checkpoint)
        self.state = state
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        plain = [p for p in self.parameters.values() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.99),
        )
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema_decay else {}
        self.step = 0
        if self.checkpoint.exists():
            self.resume()

    def run(self, until: int | None = None, log: Callable[[str], None] = print) -> None:
        """Train up to step ``until`` (default: the end), saving on the way and at the end.

        Raises:
            FloatingPointError: the loss is not finite; names the step.
        """
        config, last = self.config, min(until or self.config.steps, self.config.steps)
        sums: dict[str, float] = {}
        counted, started = 0, time.monotonic()
        while self.step < last:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config)
            device = next(iter(self.parameters.values())).device.type
            with torch.autocast(device, torch.bfloat16, enabled=config.autocast):
                loss, figures = self.loss(self.step, step_generator(config.seed, self.step))
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The loss at step {self.step} is {loss.item()}, expected a number: "
                    f"resume {self.checkpoint} with a lower learning rate."
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip)
            self.optimizer.step()
            self.update_average()
            self.step += 1
            counted += 1
            for name, value in {"loss": loss.item(), **figures}.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.step % config.log_every == 0 or self.step == last:
                rate = counted / (time.monotonic() - started)
                means = "  ".join(f"{name} {value / counted:.4f}" for name, value in sums.items())
                log(f"step {self.step}/{config.steps}  {means}  {rate:.2f} steps/s")
                sums, counted, started = {}, 0, time.monotonic()
            if self.step % config.save_every == 0 or self.step == last:
                self.save()

    def update_average(self) -> None:
        """Move the weight average towards the weights; faster in the first steps, so that it forgets the start."""
        if self.average:
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            parameters = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The module with its averaged weights, for the length of a ``with`` block."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        source = self.average or kept
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(source[name])
        try:
            yield self.module
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(kept[name])

    def save(self) -> None:
        """Write the whole run (weights, average, optimiser, step) to ``checkpoint``, atomically."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        if self.state is not None:
            tensors |= {f"state.{name}": value for name, value in self.state.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        write_tensors(tensors, self.checkpoint, {"step": str(self.step)})

    def resume(self) -> None:
        """Read a run back from ``checkpoint``."""
        tensors, metadata = read_tensors(self.checkpoint)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

        self.step = int(metadata["step"])
        self.module.load_state_dict(part("module."))
        average = part("average.")
        # In the order of the parameters, which a file does not keep.
        self.average = {name: average[name].to(p.device) for name, p in self.parameters.items() if average}
        if self.state is not None:
            self.state.load_state_dict(part("state."))
        for name, parameter in self.parameters.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
            if keys:  # a parameter that the loss does not reach has none
                state = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
                # The step counter stays on the CPU, where AdamW keeps it.
                self.optimizer.state[parameter] = state | {
                    key: state[key].to(parameter.device) for key in keys if key != "step"
                }


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors under a temporary name, then rename: a crash leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, metadata))
    os.replace(partial, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a mapping
