"""The cost of what every calibrated conversion measures: sensitivities before it, and the loss at its end."""

import math

from bwla_converter.calibration.text import MAX_HELD_OUT_TOKENS
from bwla_converter.recipes.workload import (
    FLOAT_BYTES,
    WORKSPACE_BYTES,
    ComputeEstimate,
    MemoryEstimate,
    Workload,
)

MIN_TOKENS, MAX_TOKENS = 4096, 16384
"""Tokens of calibration text that sensitivities are measured on, where there are so many. The inputs of all decoder
layers are kept for all of them, so large models get no more."""

TOKENS_PER_COLUMN = 2
"""The same, in units of the columns of the widest input group: fewer make its Hessian singular."""

PASSES = 4
"""Products of a decoder layer with its inputs while sensitivities are measured: forwards, forwards again for the
gradients, backwards. The weights get no gradients."""


def sensitivity_tokens(columns: int) -> int:
    """Return the tokens that sensitivities are measured on, for `columns` of the widest input group."""
    return min(max(MIN_TOKENS, TOKENS_PER_COLUMN * columns), MAX_TOKENS)


def measured_tokens(workload: Workload) -> int:
    """Return the tokens that the sensitivities of a conversion are measured on."""
    columns = max((spec.in_features for spec in workload.specs.values()), default=0)
    return min(workload.tokens, sensitivity_tokens(columns))


def measurement_hidden_bytes(workload: Workload) -> int:
    """Return the size of the hidden states that are kept while sensitivities are measured: those before each layer."""
    width = workload.source.entries[workload.source.embedding_weight].shape[1]
    return FLOAT_BYTES * measured_tokens(workload) * width * (workload.source.num_layers + 2)


def measurement_memory(workload: Workload) -> MemoryEstimate:
    """Return the memory of the sensitivities of the layer that needs the most."""
    largest = 0.0
    for layer in workload.distinct_layers():
        squares = [group.square for _, group in layer.groups]
        # Two second moments of each group, and the factorization of one of them in float64.
        matrices = 2 * FLOAT_BYTES * sum(squares) + 6 * FLOAT_BYTES * max(squares, default=0)
        held = layer.stored_bytes + FLOAT_BYTES * layer.weights + matrices
        # What a backward pass keeps of a batch: inputs and outputs of every linear, and as much between them.
        rows = sum(group.used_rows + group.columns for _, group in layer.groups)
        largest = max(largest, held + 2 * FLOAT_BYTES * workload.batch_tokens(2) * rows)
    return MemoryEstimate(largest + WORKSPACE_BYTES, "measuring sensitivities")


def measurement_compute(workload: Workload) -> ComputeEstimate:
    """Estimate the work of measuring sensitivities and of the loss of both models."""
    tokens = measured_tokens(workload)
    head = math.prod(workload.source.entries[workload.source.embedding_weight].shape)
    squares = sum(group.square for group in workload.groups())
    used = sum(group.used_rows * group.columns for group in workload.groups())
    flops = 2 * tokens * (PASSES * (used + head) + 2 * squares)
    loss = 2 * 2 * min(workload.tokens, MAX_HELD_OUT_TOKENS) * (used + head)
    elements = sum(8 * tokens * (group.used_rows + 2 * group.columns) for group in workload.groups())
    factorizations = sum(2.5 * group.columns**3 for group in workload.groups())
    return ComputeEstimate(factorizations, FLOAT_BYTES * elements, flops + loss)
