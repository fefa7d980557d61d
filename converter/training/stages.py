"""Sections of a model: what of it may learn at a time, and how much of the work each section gets."""

import math
from dataclasses import replace
from itertools import pairwise

from bwla_converter.source.model import Source
from bwla_converter.training.optimize import TuneOptions

SIGNS_AT_ONCE = 2**28
"""Weights whose signs learn at a time, but at least a block's: 4 GB of latent weights, gradients, Adam's moments."""


def sections(source: Source, at_once: int = SIGNS_AT_ONCE) -> list[tuple[list[int], int]]:
    """The blocks in order, in parts of at most `at_once` weights, or of one block where that has more; and how many."""
    parts: list[tuple[list[int], int]] = []
    for index in range(source.num_layers):
        shapes = (source.entries[f"{name}.weight"].shape for name in source.linears_of_layer(index))
        weights = sum(map(math.prod, shapes))
        if parts and parts[-1][1] + weights <= at_once:
            parts[-1] = ([*parts[-1][0], index], parts[-1][1] + weights)
        else:
            parts.append(([index], weights))
    return parts


def split_budget(options: TuneOptions, count: int, parts: int) -> list[TuneOptions]:
    """Options of each of the parts that one after the other do the work of `options` on `count` windows."""
    steps = options.steps(count)
    ends = [steps * part // parts for part in range(parts + 1)]
    minutes = options.minutes and options.minutes / parts
    return [replace(options, max_steps=end - begin, minutes=minutes) for begin, end in pairwise(ends)]
