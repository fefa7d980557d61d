"""Recipe `paper` for one input group: BWLA (arXiv 2605.00422) with what its relatives do with calibration data.

OKT learns the rotation and PSP the low-rank correction from the weights alone, as the publication describes. It also
calibrates, and does not say how. What is left of the weight is therefore binarized as TWLA (arXiv 2606.13054, by the
same authors), BiLLM (arXiv 2402.04291) and ARB-LLM (arXiv 2410.03129) do it: with the Hessian H = E[x x^T] of the
inputs in the rotated basis, signs are chosen column by column with GPTQ's error feedback, then signs, row scales,
column scales and the factor B of the low-rank correction are refined in turn. x are the inputs in the model whose
preceding layers are quantized, and the target is the original weight.

The steps of the binarization are those of `quantize.fast`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from bwla_converter.quantize.fast import (
    SCALE_FACTORS,
    State,
    binarization_step,
    column_scale_step,
    group_result,
    relative_norm,
    row_factor_step,
)
from bwla_converter.quantize.group import GroupResult, check_group, group_generator, pool_rows
from bwla_converter.quantize.low_rank.psp import proximal_low_rank
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_converter.quantize.okt.rotation import learn_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import rotate, rotate_back
from bwla_kernels.sign_search import Effort, Metric, Target
from torch import Tensor


@dataclass(frozen=True)
class PaperOptions:
    """Hyperparameters of the `paper` recipe.

    Attributes:
        okt_rounds: rounds of OKT, 40 in the publication.
        psp_rounds: rounds of PSP, 20 in the publication.
        rounds: times that the signs are chosen; column scales and B are refitted in between. 1 keeps the column scales
            at 1.
        sweeps: sweeps of sign refinement after the error feedback of the last round; the row scales are refitted after
            each (the alternating refinement of ARB-LLM). The rounds before it have one sweep, if any.
        scale_factors: initial row scales of the last round, in units of the row's mean magnitude. The best three of
            each row go through one sweep, and the best two of these through the others.
        damping: added to the diagonal of the Hessian, in units of its mean.
        choose_clip: choose the activation clip; otherwise the spec's is used.
    """

    okt_rounds: int = 40
    psp_rounds: int = 20
    rounds: int = 3
    sweeps: int = 8
    scale_factors: tuple[float, ...] = SCALE_FACTORS
    damping: float = 0.01
    choose_clip: bool = True

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """Return how thoroughly each round searches for signs."""
        first = Effort((1.0,), ((1, min(self.sweeps, 1)),), exact=False)
        stages = ((3, min(self.sweeps, 1)), (2, max(self.sweeps - 1, 0)))
        return (*[first] * (self.rounds - 1), Effort(self.scale_factors, stages))


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    moments: Moments,
    *,
    inputs: Tensor | None = None,
    seed: int = 0,
    options: PaperOptions | None = None,
) -> GroupResult:
    """Quantize the linears of one input group.

    Holds a few float32 copies of the group's weights and of H. Time grows with N K^2.

    Args:
        weights: module name -> W [N_i, K], any float dtype, all on one device. The order of the names matters.
        specs: module name -> spec with one plane; all must have the same input transform (K, rotation sizes, rank,
            bits, clip).
        moments: second moments of the group's inputs, on the same device; only `Moments.gram` is used.
        inputs: a sample of the inputs [M, K] for choosing the clip; None keeps the spec's clip.
        seed: seed of all randomness, together with the names.
        options: None for the defaults.

    Returns: the quantized group. Its errors and the trace "output" (after each round) are relative output errors; the
        traces "okt" and "psp" are the objectives of both steps.

    Raises:
        SourceError: weights and specs do not fit together, or the moments are not finite. Raised before quantization
            starts.
    """
    options = options or PaperOptions()
    spec = check_group(weights, {}, specs)
    generator = group_generator(seed, weights)
    state, norm, traces = alternate(weights, spec, moments, generator, options, options.efforts)
    result = group_result(state, weights, specs, norm, inputs=inputs if options.choose_clip else None)
    return replace(result, traces=traces)


def alternate(
    weights: Mapping[str, Tensor],
    spec: LayerSpec,
    moments: Moments,
    generator: torch.Generator,
    options: PaperOptions,
    efforts: Sequence[Effort],
) -> tuple[State, Tensor, dict[str, list[float]]]:
    """Fit the low-rank correction, then choose the signs once for each of `efforts`, with refits in between.

    Returns: the last state, `Target.norms` of the target, and the traces; `spec` is that of `check_group`, the other
        arguments are as in `quantize_group`.
    """
    state, psp_trace = start_state(weights, spec, moments, generator, options)
    target_norm = state.target.norms()
    trace: list[float] = []
    for effort in efforts:
        # Rebind `state` after every step, so that at most two states are alive.
        if trace:
            state = column_scale_step(state)
            if spec.rank:
                state = row_factor_step(state)
        state = binarization_step(state, effort, planes=1)
        trace.append(relative_norm(state.signs.error, target_norm))
    rotation = state.rotation
    return state, target_norm, {rotation.objective: rotation.trace, "psp": psp_trace, "output": trace}


def start_state(
    weights: Mapping[str, Tensor],
    spec: LayerSpec,
    moments: Moments,
    generator: torch.Generator,
    options: PaperOptions,
) -> tuple[State, list[float]]:
    """Learn the rotation, rotate weight and Hessian, and fit the low-rank correction. `spec` is that of `check_group`.

    Returns: the state, and the trace of PSP.
    """
    hessian = moments.hessian(options.damping)
    sizes = (spec.rotation_groups, spec.n1, spec.n2)
    rotation = learn_rotation(list(weights.values()), sizes, rounds=options.okt_rounds, generator=generator)
    weight = rotate(pool_rows(weights.values()), rotation.left, rotation.right)
    low_rank = proximal_low_rank(weight, spec.rank, rounds=options.psp_rounds, generator=generator)
    metric = Metric.of(rotate_hessian(hessian, rotation.left, rotation.right))
    state = State(
        rotation,
        Target.of(weight, metric),
        metric=metric,
        column_scale=torch.ones(spec.in_features, device=weight.device),
        # Rounded as they are stored, so that the binarization compensates the rounding.
        low_rank_a=rotate_back(low_rank.a, rotation.left, rotation.right).bfloat16(),
        low_rank_b=low_rank.b.bfloat16(),
    )
    return state, low_rank.trace
