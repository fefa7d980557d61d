"""Quantize the input groups of experts, which have too many rows to be quantized at once.

The linears of such a group share one input transform. It is learned on rows from all of them, as a recipe does for any
group; then the rows are quantized for it, some linears at a time. The down projections of experts have inputs of their
own, so each of them has its own Hessian; the input transform is learned for the sum of all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from bwla_converter.quantize import fast, paper
from bwla_converter.quantize.fast import State, clip_of, group_result, row_factor_step
from bwla_converter.quantize.group import GroupResult, check_group, group_generator, pool_rows
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_converter.quantize.okt.rotation import Rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import rotate
from bwla_kernels.sign_search import Effort, Metric, Target
from torch import Tensor

SAMPLE_ROWS = 2**13
"""Rows on which the input transform is learned."""

CHUNK_ROWS = 2**13
"""Rows that are quantized at a time where all linears have the same inputs."""

Learned = tuple[State, Tensor, dict[str, list[float]]]
"""A state, norms of its target, and traces, as `fast.alternate` returns them."""

Learn = Callable[[Mapping[str, Tensor], LayerSpec, Moments, torch.Generator], Learned]
"""Quantizes some rows, for their input transform: (weights, spec, moments, generator) -> what was learned."""


@dataclass(frozen=True)
class Method:
    """How a recipe quantizes the experts of a group.

    Attributes:
        learn: learns the input transform on some rows.
        target: (rows W of some linears [N, K], moments of their inputs) -> what is approximated [N, K].
        damping: moments -> what is added to the diagonal of the Hessian, in units of its mean.
        efforts: the efforts of the rounds in which all rows are quantized; B of the low-rank correction is refitted
            before each. Only the last one takes place where there is no such correction.
        choose_clip: choose the activation clip; otherwise the spec's is used.
        keep_latents: return what the signs were chosen for, see `GroupResult.latents`.
    """

    learn: Learn
    target: Callable[[Tensor, Moments], Tensor]
    damping: Callable[[Moments], float]
    efforts: Sequence[Effort]
    choose_clip: bool
    keep_latents: bool = False


def fast_method(options: fast.FastOptions, planes: int) -> Method:
    """Return how `fast` quantizes experts with `planes` planes."""

    def learn(
        weights: Mapping[str, Tensor], spec: LayerSpec, moments: Moments, generator: torch.Generator
    ) -> Learned:
        efforts = [options.effort(last=False)] * options.rounds
        return fast.alternate(weights, spec, moments, generator, options, efforts)

    def target(weight: Tensor, moments: Moments) -> Tensor:
        return fast.corrected_target(weight, moments, options.damped(options.target_damping, moments))

    damping = partial(options.sign_damping, planes)
    return Method(learn, target, damping, options.efforts, options.choose_clip, options.keep_latents)


def paper_method(options: paper.PaperOptions) -> Method:
    """Return how `paper` quantizes experts."""

    def learn(
        weights: Mapping[str, Tensor], spec: LayerSpec, moments: Moments, generator: torch.Generator
    ) -> Learned:
        return paper.alternate(weights, spec, moments, generator, options, options.efforts[:-1])

    return Method(
        learn, lambda weight, _: weight, lambda _: options.damping, options.efforts[-2:], options.choose_clip
    )


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    moments: Moments,
    method: Method,
    *,
    inputs: Tensor | None = None,
    seed: int = 0,
) -> GroupResult:
    """Quantize the linears of an input group of experts.

    Holds a few float32 copies of SAMPLE_ROWS rows, of the rows that are quantized at a time, and of H.

    Args:
        weights: module name -> W [N_i, K], any float dtype, all on one device. The order of the names matters.
        specs: module name -> spec; all must have the same input transform.
        moments: second moments of the group's inputs; with `parts`, those of each linear.
        method: how the recipe does it.
        inputs: a sample of the inputs [M, K] for choosing the clip; None keeps the specs' clip.
        seed: seed of all randomness, together with the names.

    Returns: the quantized group. Its errors are relative output errors with respect to the target; the traces are those
        of the sampled rows.

    Raises:
        SourceError: weights and specs do not fit together, or the moments are not finite. Raised before quantization
            starts.
    """
    spec = check_group(weights, {}, specs)
    step = -(-sum(map(len, weights.values())) // SAMPLE_ROWS)
    sample = {name: weight[::step] for name, weight in weights.items()}
    learned, _, traces = method.learn(sample, spec, moments, group_generator(seed, weights))
    clip = clip_of(learned, inputs, spec) if inputs is not None and method.choose_clip else None
    shared = _Shared(learned.rotation, learned.column_scale, learned.low_rank_a)
    del learned  # the rest of it is large
    result = GroupResult({}, {}, traces, clip=clip)
    metric = None if moments.parts else _metric(moments, method, shared)
    for names in _chunks(weights, moments):
        own = _own_moments(names[0], moments)
        chunk = {name: weights[name] for name in names}
        state = _start(
            method.target(pool_rows(chunk.values()), own), metric or _metric(own, method, shared), shared
        )
        norm = state.target.norms()
        for effort in method.efforts if spec.rank else method.efforts[-1:]:
            if spec.rank:
                state = row_factor_step(state)
            state = fast.binarization_step(state, effort, spec.planes)
        part = group_result(state, chunk, {name: specs[name] for name in names}, norm, inputs=None)
        result.tensors.update(part.tensors)
        result.errors.update(part.errors)
        if method.keep_latents:
            result.latents.update(fast.latents_of(state, chunk))
    return result


@dataclass(frozen=True)
class _Shared:
    """What the linears of a group share, as in `fast.State`."""

    rotation: Rotation
    column_scale: Tensor
    low_rank_a: Tensor


def _metric(moments: Moments, method: Method, shared: _Shared) -> Metric:
    """Return the metric of some inputs after the input transform."""
    hessian = moments.hessian(method.damping(moments))
    rotated = rotate_hessian(hessian, shared.rotation.left, shared.rotation.right)
    return Metric.of(rotated).scaled(shared.column_scale)


def _start(target: Tensor, metric: Metric, shared: _Shared) -> State:
    """Return the state in which the search for the signs of some rows begins, given their target [N, K]."""
    rotated = rotate(target, shared.rotation.left, shared.rotation.right) / shared.column_scale
    low_rank_b = rotated.new_zeros(len(rotated), len(shared.low_rank_a), dtype=torch.bfloat16)
    return State(
        shared.rotation,
        Target.of(rotated, metric),
        metric,
        shared.column_scale,
        shared.low_rank_a,
        low_rank_b,
    )


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
