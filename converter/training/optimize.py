"""Tuning a quantized block by gradients: its outputs on the quantized model's inputs shall be the original's.

The block sees the activations that the already quantized blocks produce and is pulled towards what the original
model has at that place, so it also makes good what was lost before it (error propagation; that this is where most
of the quality of one-bit models comes from is NanoQuant's ablation). Signs move through latent weights (`tunable`);
scales, low-rank factors and norms move freely; rotations stay.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from bwla_converter.training.ste_linear import STELinear
from torch import Tensor, nn


@dataclass(frozen=True)
class TuneOptions:
    """How a block is tuned.

    Attributes:
        epochs: passes over the calibration windows; 0 leaves the block as it is.
        batch: windows a step.
        latent_rate, scale_rate, low_rank_rate, norm_rate: Adam's steps, of latent weights in units of their row's
            scale, of log scales, of low-rank factors and norms in units of their root mean square.
        momentum: share of its running mean that Adam keeps of a gradient, each step.
        warm_up: share of the work in which the rates rise; they then fall to zero along a cosine.
        max_steps: fewer steps than the epochs have; None for all of them.
        minutes: time to stop after. The result then depends on the machine's speed; None for no limit.
    """

    epochs: int = 3
    batch: int = 1
    latent_rate: float = 1e-2
    scale_rate: float = 3e-3
    low_rank_rate: float = 1e-2
    norm_rate: float = 3e-3
    momentum: float = 0.9
    warm_up: float = 0.05
    max_steps: int | None = None
    minutes: float | None = None

    def steps(self, count: int) -> int:
        """Adam's steps on `count` windows, unless the minutes end them."""
        steps = self.epochs * math.ceil(count / self.batch)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def parameter_groups(
    linears: Iterable[STELinear], norms: Iterable[nn.Parameter], options: TuneOptions
) -> list[dict[str, Any]]:
    """Adam's groups: every kind of parameter with its rate; what members share comes once."""
    latents: list[Tensor] = []
    scales: dict[int, Tensor] = {}
    factors: dict[int, Tensor] = {}
    for linear in linears:
        if linear.latent is not None:
            latents.append(linear.latent)
        for scale in (linear.log_scale, linear.side.log_column):
            scales[id(scale)] = scale
        for factor in (linear.low_rank_b, linear.side.low_rank_a):
            if factor is not None:
                factors[id(factor)] = factor
    return [
        *([{"params": latents, "lr": options.latent_rate}] if latents else []),
        {"params": list(scales.values()), "lr": options.scale_rate},
        *({"params": [factor], "lr": options.low_rank_rate * _rms(factor)} for factor in factors.values()),
        *({"params": [norm], "lr": options.norm_rate * _rms(norm)} for norm in norms),
    ]


def _rms(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.detach().double().square().mean())) or 1.0


def rate_factor(done: float, warm_up: float) -> float:
    """Share of the full rate after a share of the work: a linear warm-up, then half a cosine down to zero."""
    if done < warm_up:
        return done / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (done - warm_up) / (1.0 - warm_up)))


def tune(
    loss_of: Callable[[Tensor], Tensor],
    groups: list[dict[str, Any]],
    count: int,
    options: TuneOptions,
    generator: torch.Generator,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Adam over random batches of windows.

    Args:
        loss_of: indices of windows -> loss to lower.
        groups: from `parameter_groups`.
        count: windows.
        options: see there.
        generator: orders the windows.
        after_step: called after each step.

    Returns: mean loss of each epoch, as it was on the way; the last one may be cut short by the budget.
    """
    # The gradient of one sign is far below Adam's usual epsilon, which would keep it from moving at all.
    adam = torch.optim.Adam(groups, betas=(options.momentum, 0.95), eps=1e-15, fused=True)
    full = [group["lr"] for group in adam.param_groups]
    steps = options.steps(count)
    trace: list[float] = []
    step, started = 0, time.monotonic()
    while step < steps:
        total, seen = 0.0, 0
        for indices in torch.randperm(count, generator=generator).split(options.batch):
            done = (step + 1) / (steps + 1)
            if options.minutes is not None:
                done = max(done, (time.monotonic() - started) / (60.0 * options.minutes))
            if done >= 1.0:
                steps = step
            if step >= steps:
                break
            for group, rate in zip(adam.param_groups, full, strict=True):
                group["lr"] = rate * rate_factor(done, options.warm_up)
            adam.zero_grad(set_to_none=True)
            loss = loss_of(indices)
            loss.backward()
            adam.step()
            after_step()
            total += float(loss.detach()) * len(indices)
            seen += len(indices)
            step += 1
        if seen:
            trace.append(total / seen)
    return trace
