"""Recipe `fast` for one input group: minimize the output error in closed form, without gradients.

The objective is E||W x - W' x_hat||^2, where x are the group's inputs in the original model and x_hat its inputs in the
model whose preceding layers are quantized. The best unquantized W' is W E[x x_hat^T] E[x_hat x_hat^T]^-1 (as in GPTAQ,
arXiv 2504.02692), which also compensates the error of the preceding layers. Where the output is added to the residual
stream, W' can compensate the error of the stream as well (`corrected_target`). W' replaces W as the target.

In the basis of OKT's rotation, three steps then alternate, each with the Hessian H = E[x_hat x_hat^T]: column scales
(`column_scale_step`), the low-rank correction (`low_rank_step`), and signs with row scales (`binarization_step`). H is
factorized once and the products of the target with it are computed once; the steps only update them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from bwla_converter.quantize.activation_clip import choose_clip
from bwla_converter.quantize.group import GroupResult, check_group, group_generator, pool_rows, store_group
from bwla_converter.quantize.low_rank.hessian import hessian_low_rank
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_converter.quantize.okt.rotation import Rotation, learn_rotation, objective_for
from bwla_kernels.format import LayerSpec
from bwla_kernels.precision import fast_products
from bwla_kernels.reference import rotate, rotate_back
from bwla_kernels.sign_search import BinaryWeight, Effort, Metric, Target, gptq_binarize
from torch import Tensor

COLUMN_SCALE_UPDATE_RANGE = (0.5, 2.0)
"""Bounds of the factor by which one round changes a column scale. Column scales multiply the activations, and a few
large columns would take the resolution of the activation codes from all others."""

SCALE_FACTORS = (0.7, 0.9, 1.0, 1.15, 1.3, 1.6)
"""Initial row scales of the last round, in units of the row's mean magnitude."""

PLANE_SCALE_FACTORS = (0.8, 0.9, 1.0, 1.1)
"""Initial scales of several planes in the last round, see `sign_search.planes`."""


@dataclass(frozen=True)
class FastOptions:
    """Hyperparameters of the `fast` recipe.

    Attributes:
        okt_rounds: rounds of OKT; 0 keeps the random initial rotation.
        rounds: alternations of column scales, low-rank correction and binarization.
        sweeps: sweeps of coordinate descent that a row's signs go through in the last round.
        gptq_signs: choose the initial signs with GPTQ's error feedback; otherwise they are the residual's own signs.
        damping: added to the diagonal of the Hessian, in units of its mean; see `damping_tokens`.
        planes_damping: the same for several planes. What they leave is small beside the error that fitting the
            calibration samples makes on other text, so they need more.
        target_damping: regularization of the target towards the original weight, in the same units; infinity keeps the
            original weight.
        damping_tokens: tokens per column from which on the dampings are as given. With fewer tokens they grow in
            inverse proportion, as the sampling error of the moments does: what is fitted to it is lost on other text.
        compensate_residual_stream: also compensate the error accumulated in the residual stream.
        column_scales: fit column scales; otherwise they are 1.
        final_norm: fit the final norm once all layers are quantized.
        choose_clip: choose the activation clip; otherwise the spec's is used.
        keep_latents: return what the signs were chosen for, see `GroupResult.latents`.
    """

    okt_rounds: int = 20
    rounds: int = 2
    sweeps: int = 8
    gptq_signs: bool = True
    damping: float = 0.04
    planes_damping: float = 0.2
    target_damping: float = 0.1
    damping_tokens: int = 50
    compensate_residual_stream: bool = True
    column_scales: bool = True
    final_norm: bool = True
    choose_clip: bool = True
    keep_latents: bool = False

    def damped(self, damping: float, moments: Moments) -> float:
        """Return one of the dampings for as many tokens as the moments have seen."""
        columns = len(moments.gram)
        return damping * max(1.0, self.damping_tokens * columns / max(moments.count, 1))

    def sign_damping(self, planes: int, moments: Moments) -> float:
        """Return the damping of the Hessian that signs and scales of `planes` planes are chosen with."""
        return self.damped(self.damping if planes == 1 else self.planes_damping, moments)

    def effort(self, last: bool) -> Effort:
        """Return how thoroughly a round searches for signs.

        Only the last round searches thoroughly: the best three of six initial scales go through a sweep, and the best
        two of these through the others. The rounds before it only have to give the other steps a good estimate.
        """
        if not last:
            return Effort((1.0,) if self.gptq_signs else (), ((1, min(self.sweeps, 1)),), exact=False)
        stages = ((3, min(self.sweeps, 1)), (2, max(self.sweeps - 1, 0)))
        return Effort(SCALE_FACTORS if self.gptq_signs else (), stages, plane_factors=PLANE_SCALE_FACTORS)

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """Return the effort of each round."""
        return tuple(self.effort(last=number == self.rounds) for number in range(1, self.rounds + 1))


@dataclass(frozen=True)
class State:
    """State of the alternation, in the basis of the rotation.

    `target`, `metric` and `binary` are in units of the column scales: the inputs are multiplied by them,
    the weight is divided.

    Attributes:
        rotation: the group's rotation, fixed.
        target: rows of all linears of the group, [N, K].
        metric: the Hessian H and its factors.
        column_scale: float32 [K].
        low_rank_a: A as it is stored, in the basis of the original input, bfloat16 [r, K].
        low_rank_b: B as it is stored, bfloat16 [N, r].
        binary: signs and row scales that approximate `residual`; None before the first round.
    """

    rotation: Rotation
    target: Target
    metric: Metric
    column_scale: Tensor
    low_rank_a: Tensor
    low_rank_b: Tensor
    binary: BinaryWeight | None = None

    @property
    def residual(self) -> Target:
        """Return the target minus the low-rank correction."""
        if not len(self.low_rank_a):
            return self.target
        rotated_a = rotate(self.low_rank_a, self.rotation.left, self.rotation.right)
        return self.target.minus(self.low_rank_b.float(), rotated_a / self.column_scale, self.metric)

    @property
    def signs(self) -> BinaryWeight:
        """Return `binary` after the first round."""
        assert self.binary is not None
        return self.binary


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    moments: Moments,
    *,
    inputs: Tensor | None = None,
    seed: int = 0,
    options: FastOptions | None = None,
) -> GroupResult:
    """Quantize the linears of one input group.

    Holds a few float32 copies of the group's weights and of H. Time grows with N K^2.

    Args:
        weights: module name -> W [N_i, K], any float dtype, all on one device. The order of the names matters.
        specs: module name -> spec; all must have the same input transform (K, rotation sizes, rank, bits, clip).
        moments: second moments of the group's inputs, on the same device.
        inputs: a sample of the inputs [M, K] for choosing the clip; None keeps the spec's clip.
        seed: seed of all randomness, together with the names.
        options: None for the defaults.

    Returns: the quantized group. Its errors and the trace "output" (after each round) are relative output errors with
        respect to the target.

    Raises:
        SourceError: weights and specs do not fit together, or the moments are not finite. Raised before quantization
            starts.
    """
    options = options or FastOptions()
    spec = check_group(weights, {}, specs)
    efforts = options.efforts if spec.rank or options.column_scales else options.efforts[-1:]
    state, norm, traces = alternate(weights, spec, moments, group_generator(seed, weights), options, efforts)
    result = group_result(state, weights, specs, norm, inputs=inputs if options.choose_clip else None)
    return replace(result, traces=traces, latents=latents_of(state, weights) if options.keep_latents else {})


def alternate(
    weights: Mapping[str, Tensor],
    spec: LayerSpec,
    moments: Moments,
    generator: torch.Generator,
    options: FastOptions,
    efforts: Sequence[Effort],
) -> tuple[State, Tensor, dict[str, list[float]]]:
    """Alternate between column scales, low-rank correction and signs, once for each of `efforts`.

    The arguments are as in `quantize_group`, `spec` is that of `check_group`.

    Returns: the last state, `Target.norms` of the target, and the traces.
    """
    state = start_state(weights, spec, moments, generator, options)
    target_norm = state.target.norms()
    trace: list[float] = []
    for effort in efforts:
        # Rebind `state` after every step, so that at most two states are alive.
        if options.column_scales and trace:
            state = column_scale_step(state)
        if spec.rank:
            state = low_rank_step(state, spec.rank, generator)
        state = binarization_step(state, effort, spec.planes)
        trace.append(relative_norm(state.signs.error, target_norm))
    return state, target_norm, {state.rotation.objective: state.rotation.trace, "output": trace}


def latents_of(state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `GroupResult.latents` of the last state."""
    rows = [len(weight) for weight in weights.values()]
    parts = (state.residual.weight / state.signs.scale[:, :1]).split(rows)
    return dict(zip(weights, parts, strict=True))


def start_state(
    weights: Mapping[str, Tensor],
    spec: LayerSpec,
    moments: Moments,
    generator: torch.Generator,
    options: FastOptions,
) -> State:
    """Compute the target and the Hessian, learn the rotation, and rotate both. `spec` is that of `check_group`."""
    hessian = moments.hessian(options.sign_damping(spec.planes, moments))
    target_damping = options.damped(options.target_damping, moments)
    weight = corrected_target(pool_rows(weights.values()), moments, target_damping)
    sizes = (spec.rotation_groups, spec.n1, spec.n2)
    rotation = learn_rotation(
        [weight], sizes, objective=objective_for(spec.planes), rounds=options.okt_rounds, generator=generator
    )
    weight = rotate(weight, rotation.left, rotation.right)
    metric = Metric.of(rotate_hessian(hessian, rotation.left, rotation.right))
    target = Target.of(weight, metric)
    return State(
        rotation,
        target,
        metric=metric,
        column_scale=torch.ones(spec.in_features, device=weight.device),
        low_rank_a=weight.new_zeros(0, spec.in_features, dtype=torch.bfloat16),
        low_rank_b=weight.new_zeros(len(weight), 0, dtype=torch.bfloat16),
    )


def corrected_target(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """Return W + E[e x_hat^T] (H + d)^-1 with e = W (x - x_hat), H = E[x_hat x_hat^T], d = `damping` mean(diag(H)).

    That is the ridge regression of W x on x_hat towards W. Where the output is added to the residual stream h,
    e = W (x - x_hat) + h - h_hat: the error of the stream is compensated as far as it correlates with x_hat. Without a
    stream, E[e x_hat^T] is computed as W (E[x x_hat^T] - H).

    Args:
        weight: float32 [N, K].
        moments: second moments of the group's inputs.
        damping: see `FastOptions.target_damping`.

    Returns: float32 [N, K]; `weight` itself if the moments do not say what the original model computes.
    """
    if damping == float("inf"):
        return weight
    if moments.error_cross_gram is not None:
        change = moments.error_cross_gram / moments.count
    elif moments.cross_gram is not None:
        with fast_products(weight.device):
            change = weight @ ((moments.cross_gram - moments.gram) / moments.count)
    else:
        return weight
    # The factorization needs float64 where a few inputs are much larger than the others. The solution does not: it is
    # only a correction.
    lower = torch.linalg.cholesky(moments.hessian(damping).double()).float()
    return torch.cholesky_solve(change.mT, lower).mT.add_(weight)


def column_scale_step(state: State) -> State:
    """Refit the column scales to the current signs and row scales."""
    update = fit_column_scales(state.residual, state.signs, state.metric.hessian)
    return replace(
        state,
        target=state.target.scaled(update),
        metric=state.metric.scaled(update),
        column_scale=state.column_scale * update,
    )


def fit_column_scales(residual: Target, binary: BinaryWeight, hessian: Tensor) -> Tensor:
    """Return the column scales b with which W ~ diag(a) S diag(b) has the smallest output error.

    Least squares in b: (sum_i a_i^2 s_i s_i^T * H) b = sum_i a_i s_i * (H w_i), where * is the elementwise product.

    Args:
        residual: W [N, K] and H W^T.
        binary: signs S and row scales a.
        hessian: H, positive definite, float32 [K, K].

    Returns: float32 [K], clamped to COLUMN_SCALE_UPDATE_RANGE, then normalized to a geometric mean of 1.
    """
    scaled_signs = binary.dequantize()
    with fast_products(hessian.device):
        system = (scaled_signs.mT @ scaled_signs) * hessian
    right_side = (scaled_signs.mT * residual.hessian_product).sum(1)
    # Positive definite: an elementwise product of a positive semidefinite matrix without a zero on its diagonal and a
    # positive definite one (Schur product theorem). Signs of different columns are nearly uncorrelated, so the system
    # is nearly diagonal and float32 is enough.
    lower = torch.linalg.cholesky(system)
    column = torch.cholesky_solve(right_side.unsqueeze(1), lower)[:, 0].clamp(*COLUMN_SCALE_UPDATE_RANGE)
    normalized: Tensor = column / column.log().mean().exp()
    return normalized


def low_rank_step(state: State, rank: int, generator: torch.Generator) -> State:
    """Refit the low-rank correction to what the current signs and row scales leave of the target.

    The factors are rounded as they are stored, so that binarization compensates the rounding.
    """
    error = state.target.weight if state.binary is None else state.target.weight - state.binary.dequantize()
    b, a = hessian_low_rank(error, state.metric.hessian, rank, generator)
    unrotated_a = rotate_back(a * state.column_scale, state.rotation.left, state.rotation.right)
    return replace(state, low_rank_a=unrotated_a.bfloat16(), low_rank_b=b.bfloat16())


def row_factor_step(state: State) -> State:
    """Refit B of the low-rank correction to what the current signs and scales leave of the target; A stays as it is.

    Least squares in B: B = E H A^T (A H A^T)^-1 with the error E of the binary weight. ARB-LLM refits the means of
    rows on calibration inputs, which is the same with A = (1, ..., 1).
    """
    a = rotate(state.low_rank_a, state.rotation.left, state.rotation.right) / state.column_scale
    hessian_product = state.metric.hessian @ a.mT
    error = state.target.weight if state.binary is None else state.target.weight - state.binary.dequantize()
    gram = (a @ hessian_product).double()
    b = torch.linalg.solve(gram, (error @ hessian_product).double().mT).mT
    return replace(state, low_rank_b=b.bfloat16())


def binarization_step(state: State, effort: Effort, planes: int) -> State:
    """Choose signs and row scales for the residual."""
    return replace(state, binary=gptq_binarize(state.residual, state.metric, effort, planes))


def group_result(
    state: State,
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    target_norm: Tensor,
    *,
    inputs: Tensor | None,
) -> GroupResult:
    """Build the tensors as they are stored, and the relative output error of each linear.

    Args:
        state: the state after the last step.
        weights, specs: as in `quantize_group`.
        target_norm: `Target.norms` of the target, float32 [N].
        inputs: a sample of the inputs [M, K] for choosing the clip; None keeps the specs' clip.
    """
    signs, rows = state.signs, [len(weight) for weight in weights.values()]
    parts = zip(weights, signs.error.split(rows), target_norm.split(rows), strict=True)
    spec = next(iter(specs.values()))
    return GroupResult(
        store_group(weights, specs, {}, input_transform(state), signs.sign, signs.scale, state.low_rank_b),
        {name: relative_norm(error, norm) for name, error, norm in parts},
        clip=None if inputs is None else clip_of(state, inputs, spec),
    )


def input_transform(state: State) -> dict[str, Tensor]:
    """Return the tensors that all linears of the group store."""
    tensors = {
        "rotation_left": state.rotation.left,
        "rotation_right": state.rotation.right,
        "column_scale": state.column_scale,
    }
    return {**tensors, "low_rank_a": state.low_rank_a} if len(state.low_rank_a) else tensors


def clip_of(state: State, inputs: Tensor, spec: LayerSpec) -> float:
    """Choose the activation clip on a sample of the group's inputs."""
    x_hat = rotate(inputs.float(), state.rotation.left, state.rotation.right) * state.column_scale
    return choose_clip(x_hat, state.signs.dequantize(), spec)


def relative_norm(error: Tensor, norm: Tensor) -> float:
    """Return the square root of sum(error) / sum(norm), which are squared norms; 0 for a target of zeros."""
    return math.sqrt(max(float(error.sum()), 0.0) / (float(norm.sum()) or 1.0))
