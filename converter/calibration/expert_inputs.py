"""Collect the second moments of what the down projections of a layer's experts read.

Each expert reads the tokens that the router of the quantized model sends to it. The original model's hidden values are
computed for the same tokens and experts, although its own router may decide differently, because they are what these
linears would have to return.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import DecoderLayer
from bwla_converter.calibration.stepwise import SAMPLES_PER_BATCH, StepwiseLayer
from bwla_converter.common.tensors import SAMPLE_ELEMENTS, sample_rows
from bwla_converter.hf.expert_linears import ExpertLinears
from bwla_converter.quantize.moments import Moments
from bwla_kernels.format.experts import expert_of
from bwla_kernels.precision import fast_products
from torch import Tensor

STARVED_TOKENS = 4
"""Tokens per column that a starved expert gets from the text as a whole, if there are so many."""


@dataclass(frozen=True)
class _Batch:
    """What the experts of both models read in a batch, [M, H], and the quantized model's choice [M, top-k]."""

    hidden: Tensor
    original: Tensor | None
    chosen: Tensor


def is_down(layer: DecoderLayer, name: str) -> bool:
    """Return whether the linear called `name` is the down projection of an expert."""
    experts = layer.experts_of(name)
    return experts is not None and experts.is_down(name.rpartition(".")[2])


def collect_expert_moments(
    weights: Mapping[str, Tensor],
    quantized: StepwiseLayer,
    original: StepwiseLayer | None,
    store: ActivationStore,
) -> tuple[Moments, Tensor]:
    """Run the samples up to the down projections of a layer's experts.

    An expert that fewer tokens reach than its down projection has columns is starved: its moments would say little. It
    gets the hidden values that it computes for other tokens.

    Args:
        weights: full name of each down projection -> its weight [H, I].
        quantized: the quantized layer, whose gate and up projections are quantized.
        original: the original layer; None where the recipe does not compare with it.
        store: tells the device and the other processes.

    Returns: the moments of all tokens, with those of each expert as `parts`, and some of the inputs [M, I].
    """
    names, first = list(weights), next(iter(weights.values()))
    width = first.shape[1]
    parts = {name: Moments.zeros(width, store.device, original is not None) for name in names}
    by_number = {expert_of(name): parts[name] for name in names}
    layers = _experts(quantized, names[0]), None if original is None else _experts(original, names[0])
    sampled: list[Tensor] = []
    limit = SAMPLE_ELEMENTS * SAMPLES_PER_BATCH // len(quantized.samples)
    with fast_products(store.device):
        for batch in _batches(names[0], quantized, original):
            values = []
            for number, tokens, _ in layers[0].routed(batch.chosen):
                values.append(_add(by_number[number], number, tokens, layers, batch))
            sampled.append(sample_rows(torch.cat(values), limit).clone())
        for part in parts.values():
            store.processes.sum_moments(part)
        total = Moments.zeros(width, store.device, original is not None)
        for part in parts.values():
            total.include(part)
        total.parts, total.starved = parts, tuple(name for name in names if parts[name].count < width)
        if total.starved:
            _feed(total, layers, _batches(names[0], quantized, original), store)
    return total, torch.cat(sampled)


def _feed(
    total: Moments,
    layers: tuple[ExpertLinears, ExpertLinears | None],
    batches: Iterator[_Batch],
    store: ActivationStore,
) -> None:
    """Add the hidden values for all tokens, up to STARVED_TOKENS per column, to the moments of the starved experts."""
    added = {
        name: Moments.zeros(len(total.gram), store.device, total.cross_gram is not None)
        for name in total.starved
    }
    wanted = STARVED_TOKENS * len(total.gram)
    for batch in batches:
        tokens = torch.arange(len(batch.hidden), device=batch.hidden.device)
        for name, part in added.items():
            number = expert_of(name)
            assert number is not None
            _add(part, number, tokens, layers, batch)
        if min(part.count for part in added.values()) >= wanted:
            break
    for name, part in added.items():
        store.processes.sum_moments(part)
        total.parts[name].include(part)


def _add(
    part: Moments,
    number: int,
    tokens: Tensor,
    layers: tuple[ExpertLinears, ExpertLinears | None],
    batch: _Batch,
) -> Tensor:
    """Add the hidden values of expert `number` for some tokens of a batch to its moments, and return them."""
    quantized, original = layers
    values = quantized.hidden_values(number, batch.hidden[tokens])
    wanted = None
    if original is not None and batch.original is not None:
        wanted = original.hidden_values(number, batch.original[tokens])
    part.add(values, wanted)
    return values


def _batches(name: str, quantized: StepwiseLayer, original: StepwiseLayer | None) -> Iterator[_Batch]:
    if original is None:
        for hidden, chosen in quantized.routing(name):
            yield _Batch(hidden, None, chosen)
        return
    for (hidden, chosen), (wanted, _) in zip(quantized.routing(name), original.routing(name), strict=True):
        yield _Batch(hidden, wanted, chosen)


def _experts(layer: StepwiseLayer, name: str) -> ExpertLinears:
    experts = layer.layer.experts_of(name)
    assert experts is not None
    return experts
