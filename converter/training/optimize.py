"""Gradient-based training of quantized layers: learning rates, schedule and training loop.

Signs are trained through latent weights (`ste_linear`), scales, low-rank factors and norms directly; rotations stay
fixed.
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
    """Hyperparameters of a training run.

    Attributes:
        epochs: passes over the calibration samples; 0 for no training.
        batch: samples per step.
        latent_rate, scale_rate, low_rank_rate, norm_rate: Adam's learning rates: of latent weights in units of their
            row's scale, of the logarithms of scales, of low-rank factors and norms relative to their root mean square.
        momentum: Adam's beta_1.
        warm_up: share of the training in which the rates rise linearly; they then fall to zero along a cosine.
        max_steps: upper limit of the number of steps; None for no limit.
        minutes: time limit; the result then depends on the machine's speed. None for no limit.
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
        """Return the number of steps on `count` samples, the time limit aside."""
        steps = self.epochs * math.ceil(count / self.batch)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def parameter_groups(
    linears: Iterable[STELinear], norms: Iterable[nn.Parameter], options: TuneOptions
) -> list[dict[str, Any]]:
    """Return Adam's parameter groups, each with its learning rate; parameters that linears share occur once."""
    latents: list[Tensor] = []
    scales: dict[int, Tensor] = {}
    factors: dict[int, Tensor] = {}
    for linear in linears:
        if linear.latent is not None:
            latents.append(linear.latent)
        for scale in (linear.log_scale, linear.input_transform.log_column_scale):
            scales[id(scale)] = scale
        for factor in (linear.low_rank_b, linear.input_transform.low_rank_a):
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
    """Return the factor of the learning rates when a share `done` of the training is done.

    It rises linearly to 1 during the warm-up and then falls to 0 along half a cosine.
    """
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
    """Minimize a loss by Adam over random batches of samples.

    Args:
        loss_of: indices of samples -> their loss.
        groups: parameter groups, see `parameter_groups`.
        count: number of samples.
        options: hyperparameters.
        generator: random generator of the batches.
        after_step: called after each step.

    Returns: the mean loss of each epoch, measured while training. A limit may cut the last epoch short.
    """
    # Adam's usual epsilon is far above the gradient of a single sign and would keep it from moving.
    adam = torch.optim.Adam(groups, betas=(options.momentum, 0.95), eps=1e-15, fused=True)
    rates = [group["lr"] for group in adam.param_groups]
    steps = options.steps(count)
    trace: list[float] = []
    step, started = 0, time.monotonic()
    while step < steps:
        total, samples = 0.0, 0
        for indices in torch.randperm(count, generator=generator).split(options.batch):
            done = (step + 1) / (steps + 1)
            if options.minutes is not None:
                done = max(done, (time.monotonic() - started) / (60.0 * options.minutes))
            if done >= 1.0:
                steps = step
            if step >= steps:
                break
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor(done, options.warm_up)
            adam.zero_grad(set_to_none=True)
            loss = loss_of(indices)
            loss.backward()
            adam.step()
            after_step()
            total += float(loss.detach()) * len(indices)
            samples += len(indices)
            step += 1
        if samples:
            trace.append(total / samples)
    return trace
