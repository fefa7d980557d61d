"""Stages of distillation: the layers whose signs are trained at a time, and each stage's share of the work."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from bwla_converter.source.model import Source
from bwla_converter.training.optimize import TuneOptions

MAX_STAGE_WEIGHTS = 2**28
"""Weights whose signs are trained at a time: 4 GB of latent weights, gradients and Adam's moments."""


@dataclass(frozen=True)
class Stage:
    """Consecutive decoder layers whose signs are trained together.

    Attributes:
        layers: their indices; empty where no signs are trained.
        weights: how many quantized weights they have.
    """

    layers: tuple[int, ...] = ()
    weights: int = 0


def make_stages(source: Source, max_weights: int = MAX_STAGE_WEIGHTS) -> list[Stage]:
    """Divide the decoder layers, in order, into stages of at most `max_weights` weights, but at least one layer."""
    stages: list[Stage] = []
    for index in range(source.num_layers):
        shapes = (source.entries[f"{name}.weight"].shape for name in source.linears_of_layer(index))
        weights = sum(map(math.prod, shapes))
        if stages and stages[-1].weights + weights <= max_weights:
            stages[-1] = Stage((*stages[-1].layers, index), stages[-1].weights + weights)
        else:
            stages.append(Stage((index,), weights))
    return stages


def split_budget(options: TuneOptions, count: int, parts: int) -> list[TuneOptions]:
    """Split a training budget for `count` samples into `parts` equal consecutive stages."""
    steps = options.steps(count)
    ends = [steps * part // parts for part in range(parts + 1)]
    minutes = options.minutes and options.minutes / parts
    return [replace(options, max_steps=end - begin, minutes=minutes) for begin, end in pairwise(ends)]
