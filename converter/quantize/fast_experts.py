"""Recipe `fast` for the input groups of experts, which have too many rows to be quantized at once.

The linears of such a group share one input transform. It is learned on rows from all of them, as `fast` does for any
group; then the rows are quantized for it, some linears at a time. The down projections of experts have inputs of their
own, so each of them has its own Hessian; the input transform is learned for the sum of all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from bwla_converter.quantize.fast import (
    FastOptions,
    State,
    binarization_step,
    clip_of,
    column_scale_step,
    corrected_target,
    group_result,
    low_rank_step,
    relative_norm,
    row_factor_step,
    start_state,
)
from bwla_converter.quantize.group import GroupResult, check_group, group_generator, pool_rows
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_converter.quantize.okt import Rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import rotate
from bwla_kernels.sign_search import Metric, Target
from torch import Tensor

SAMPLE_ROWS = 2**13
"""Rows on which the input transform is learned."""

CHUNK_ROWS = 2**13
"""Rows that are quantized at a time where all linears have the same inputs."""


@dataclass(frozen=True)
class _Shared:
    """What the linears of the group share, as in `fast.State`, and the options."""

    rotation: Rotation
    column_scale: Tensor
    low_rank_a: Tensor
    planes: int
    options: FastOptions

    @property
    def damping(self) -> float:
        """Damping of the Hessian."""
        return self.options.damping if self.planes == 1 else self.options.planes_damping

    def metric(self, moments: Moments) -> Metric:
        """Return the metric of some inputs after the input transform."""
        hessian = rotate_hessian(moments.hessian(self.damping), self.rotation.left, self.rotation.right)
        return Metric.of(hessian).scaled(self.column_scale)

    def state(self, weight: Tensor, moments: Moments, metric: Metric) -> State:
        """Return the state in which the search for the signs of some rows W, float32 [N, K], begins."""
        target = corrected_target(weight, moments, self.options.target_damping)
        rotated = rotate(target, self.rotation.left, self.rotation.right) / self.column_scale
        low_rank_b = weight.new_zeros(len(weight), len(self.low_rank_a), dtype=torch.bfloat16)
        return State(
            self.rotation, Target.of(rotated, metric), metric, self.column_scale, self.low_rank_a, low_rank_b
        )


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    moments: Moments,
    *,
    inputs: Tensor | None = None,
    seed: int = 0,
    options: FastOptions | None = None,
) -> GroupResult:
    """Quantize the linears of an input group of experts.

    Holds a few float32 copies of SAMPLE_ROWS rows, of the rows that are quantized at a time, and of H.

    Args:
        weights: module name -> W [N_i, K], any float dtype, all on one device. The order of the names matters.
        specs: module name -> spec; all must have the same input transform.
        moments: second moments of the group's inputs; with `parts`, those of each linear.
        inputs: a sample of the inputs [M, K] for choosing the clip; None keeps the specs' clip.
        seed: seed of all randomness, together with the names.
        options: None for the defaults.

    Returns: the quantized group, as `fast.quantize_group` does. The trace "output" is that of the sampled rows.

    Raises:
        SourceError: weights and specs do not fit together, or the moments are not finite. Raised before quantization
            starts.
    """
    options = options or FastOptions()
    spec = check_group(weights, {}, specs)
    state, trace = _learn(weights, spec, moments, group_generator(seed, weights), options)
    shared = _Shared(state.rotation, state.column_scale, state.low_rank_a, spec.planes, options)
    clip = clip_of(state, inputs, spec) if inputs is not None and options.choose_clip else None
    okt = state.rotation.trace
    del state
    tensors: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    latents: dict[str, Tensor] = {}
    metric = None if moments.parts else shared.metric(moments)
    for names in _chunks(weights, moments):
        own = _own_moments(names[0], moments)
        chunk = {name: weights[name] for name in names}
        found = shared.state(pool_rows(chunk.values()), own, metric or shared.metric(own))
        norm = found.target.norms()
        for effort in options.efforts if spec.rank else options.efforts[-1:]:
            if spec.rank:
                found = row_factor_step(found)
            found = binarization_step(found, effort, spec.planes)
        result = group_result(found, chunk, {name: specs[name] for name in names}, norm, inputs=None)
        tensors |= result.tensors
        errors |= result.errors
        if options.keep_latents:
            rows = [len(weight) for weight in chunk.values()]
            parts = (found.residual.weight / found.signs.scale[:, :1]).split(rows)
            latents |= dict(zip(names, parts, strict=True))
    return GroupResult(tensors, errors, {"okt": okt, "output": trace}, latents, clip)


def _learn(
    weights: Mapping[str, Tensor],
    spec: LayerSpec,
    moments: Moments,
    generator: torch.Generator,
    options: FastOptions,
) -> tuple[State, list[float]]:
    """Quantize rows from all linears, for their input transform; return the state and the error after each round."""
    step = max(1, -(-sum(map(len, weights.values())) // SAMPLE_ROWS))
    sample = {name: weight[::step] for name, weight in weights.items()}
    state = start_state(sample, spec, moments, generator, options)
    norm, trace = state.target.norms(), []
    for round_number in range(1, options.rounds + 1):
        if options.column_scales and round_number > 1:
            state = column_scale_step(state)
        if spec.rank:
            state = low_rank_step(state, spec.rank, generator)
        state = binarization_step(state, options.effort(last=False), spec.planes)
        trace.append(relative_norm(state.signs.error, norm))
    return state, trace


def _chunks(weights: Mapping[str, Tensor], moments: Moments) -> Iterator[Sequence[str]]:
    """Yield the linears to quantize together: one that has moments of its own, or several of up to CHUNK_ROWS rows."""
    names: list[str] = []
    rows = 0
    for name, weight in weights.items():
        if names and (moments.parts or rows + len(weight) > CHUNK_ROWS):
            yield names
            names, rows = [], 0
        names.append(name)
        rows += len(weight)
    yield names


def _own_moments(name: str, moments: Moments) -> Moments:
    """Return the moments of a linear's inputs; those of the group where it has none, or its inputs were all zero."""
    own = moments.parts.get(name, moments)
    return own if own.count and bool(own.gram.diagonal().any()) else replace(moments, parts={})
