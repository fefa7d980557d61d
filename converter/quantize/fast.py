"""Recipe `fast`: one input group in the metric of its inputs, in closed form (no gradients).

What is minimised is the output error E||W x - W' x_hat||^2, with x the inputs that the original model gives the
group and x_hat those that the blocks quantized so far give it. The best unquantized W' is
W E[x x_hat^T] E[x_hat x_hat^T]^-1 (as in GPTAQ, arXiv 2504.02692): it also makes good what earlier blocks lost. Where
the output is added to the residual stream, what that has lost is made good as well (`corrected_target`). This W'
takes the original's place as the target; then, in the basis of OKT's rotation and the metric H = E[x_hat x_hat^T]:
the low-rank part (`hessian_low_rank`), signs by error feedback and coordinate descent, least-squares row scales
(`error_feedback`) and column scales, alternated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_converter.quantize.activation_clip import choose_clip
from bwla_converter.quantize.gptq_binary import START_FACTORS, Code, inverse_factor, one_bit
from bwla_converter.quantize.group import GroupResult, check_group, group_generator, pool_rows, store_group
from bwla_converter.quantize.hessian_low_rank import hessian_low_rank
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_converter.quantize.okt import learn_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import rotate, rotate_back
from torch import Tensor

COLUMN_SCALE_RANGE = (0.5, 2.0)
"""A column scale multiplies the activations, and one token's codes must not be spent on a few columns."""


@dataclass(frozen=True)
class FastOptions:
    """What the recipe leaves open.

    Attributes:
        okt_rounds: rounds of the rotation; 0 leaves it at its random start.
        rounds: alternations of low-rank part and signs.
        sweeps: sweeps of coordinate descent in the last round, from every starting scale.
        gptq_signs: whether signs are chosen with error feedback; without it they are the residual's own.
        damping: added to H's diagonal, in units of its mean.
        target_damping: pull of the target towards the original weight, in the same units; infinity keeps the
            original weight.
        follow_stream: whether the target makes good what the residual stream has lost.
        column_scales: whether column scales are fitted, in the metric of the inputs.
        final_norm: whether the last norm is fitted once all blocks are quantized.
        clips: whether the activation clip is chosen; without it, it is the spec's.
        latents: keep what the signs were chosen for, see `GroupResult.latents`.
    """

    okt_rounds: int = 40
    rounds: int = 3
    sweeps: int = 8
    gptq_signs: bool = True
    damping: float = 0.01
    target_damping: float = 0.02
    follow_stream: bool = True
    column_scales: bool = True
    final_norm: bool = True
    clips: bool = True
    latents: bool = False

    @property
    def passes(self) -> int:
        """Times that the recipe goes through all signs of a group.

        Error feedback from every start in each round, a sweep of coordinate descent in each but the last, and there
        its sweeps from every start.
        """
        starts = len(START_FACTORS)
        return self.rounds * starts + self.rounds - 1 + self.sweeps * starts


def corrected_target(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """(W C + D + d W) (H + d)^-1 with C = E[x x_hat^T], H = E[x_hat x_hat^T], d = `damping` times H's mean diagonal.

    D = E[(h - h_hat) x_hat^T] where the output is added to a stream h: what the stream has lost is made good too,
    as far as x_hat tells it.

    Args:
        weight: float32 [N, K].
        moments: of the group's inputs.
        damping: see `FastOptions.target_damping`.

    Returns: float32 [N, K]; `weight` itself where the original's inputs were not followed.
    """
    if moments.cross_gram is None or damping == float("inf"):
        return weight
    hessian = moments.hessian(damping)
    ridge = hessian - moments.gram / moments.count
    wanted = weight @ (moments.cross_gram / moments.count + ridge)
    if moments.residual_cross_gram is not None:
        wanted += moments.residual_cross_gram / moments.count
    lower = torch.linalg.cholesky(hessian.double())
    return torch.cholesky_solve(wanted.double().mT, lower).mT.float()


def fit_columns(residual: Tensor, code: Code, hessian: Tensor) -> Tensor:
    """Column scales that fit residual = diag(a) S diag(b) best in the metric H: least squares in b.

    (sum_i a_i^2 s_i s_i^T * H) b = sum_i a_i s_i * (H w_i), with * entry by entry.

    Args:
        residual: W, float32 [N, K].
        code: signs S and row scales a.
        hessian: H [K, K], positive definite.

    Returns: float32 [K], within COLUMN_SCALE_RANGE, geometric mean 1.
    """
    scaled = code.scale.unsqueeze(1) * code.sign
    system = ((scaled.mT @ scaled) * hessian).double()
    wanted = (scaled * (residual @ hessian)).sum(0).double()
    column = torch.linalg.solve(system, wanted).float().clamp(*COLUMN_SCALE_RANGE)
    centred: Tensor = column / column.log().mean().exp()
    return centred


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    moments: Moments,
    *,
    inputs: Tensor | None = None,
    seed: int = 0,
    options: FastOptions | None = None,
) -> GroupResult:
    """Quantize the linears that read one input.

    Holds a few float32 copies of the group's weights and of H. Time grows as N K^2.

    Args:
        weights: module name -> W [N_i, K], any float dtype, one device. The order of the names matters.
        specs: module name -> what to make of it; one input side (K, rotation sizes, rank, bits, clip).
        moments: of the group's inputs, on the same device.
        inputs: some of them [M, K], to choose the clip by.
        seed: with the names, seeds everything random.
        options: None for the defaults.

    Returns: the group; errors and the trace "output", after each round, are those of the outputs, relative to the
        target's.

    Raises:
        SourceError: weights and specs do not fit together, or the inputs are not usable; before any work.
    """
    options = options or FastOptions()
    side = check_group(weights, {}, specs)
    hessian = moments.hessian(options.damping)
    generator = group_generator(seed, weights)
    target = corrected_target(pool_rows(weights.values()), moments, options.target_damping)
    rotation = learn_rotation(
        [target], (side.rotation_groups, side.n1, side.n2), rounds=options.okt_rounds, generator=generator
    )
    basis = (rotation.left, rotation.right)
    target, hessian = rotate(target, *basis), rotate_hessian(hessian, *basis)
    factor = inverse_factor(hessian)
    power = ((target @ hessian) * target).sum(1)
    shared = {
        "rotation_left": rotation.left,
        "rotation_right": rotation.right,
        "column_scale": torch.ones(side.in_features, device=target.device),
    }
    code: Code | None = None
    residual, low_rank_b, trace = target, target.new_zeros(len(target), 0, dtype=torch.bfloat16), []
    rounds = options.rounds if side.rank or options.column_scales else 1
    for number in range(1, rounds + 1):
        if code is not None and options.column_scales:
            # From here on in units of the column scales: x_hat is multiplied by them, the weight divided.
            column = fit_columns(residual, code, hessian)
            shared["column_scale"] = shared["column_scale"] * column
            target, hessian = target / column, column.unsqueeze(1) * hessian * column
            factor = inverse_factor(hessian)
        if side.rank:
            rest = target if code is None else target - code.scale.unsqueeze(1) * code.sign
            b, a = hessian_low_rank(rest, hessian, side.rank, generator)
            # Rounded as they are stored, so that the signs make good for that too.
            low_rank_b, shared["low_rank_a"] = (
                b.bfloat16(),
                rotate_back(a * shared["column_scale"], *basis).bfloat16(),
            )
            residual = target - low_rank_b.float() @ (
                rotate(shared["low_rank_a"], *basis) / shared["column_scale"]
            )
        elif code is not None:
            residual = target
        # The rounds before the last one only have to tell scales and low-rank part what the signs will be like.
        last = number == rounds
        sweeps = options.sweeps if last else min(options.sweeps, 1)
        code = one_bit(residual, hessian, factor, sweeps, options.gptq_signs, every_start=last)
        trace.append(_relative(code.error, power))
    assert code is not None
    tensors = store_group(weights, specs, {}, shared, code.sign, code.scale, low_rank_b)
    rows = [len(weight) for weight in weights.values()]
    pairs = zip(weights, code.error.split(rows), power.split(rows), strict=True)
    errors = {name: _relative(lost, of) for name, lost, of in pairs}
    clip = None
    if options.clips and inputs is not None:
        x_hat = rotate(inputs.float(), *basis) * shared["column_scale"]
        clip = choose_clip(x_hat, code.scale.unsqueeze(1) * code.sign, side)
    latents = {}
    if options.latents:
        latents = dict(zip(weights, (residual / code.scale.unsqueeze(1)).split(rows), strict=True))
    return GroupResult(tensors, errors, {"okt": rotation.trace, "output": trace}, latents, clip=clip)


def _relative(lost: Tensor, power: Tensor) -> float:
    """Root of the share of the power that is lost; 0 where there is none."""
    return math.sqrt(max(float(lost.sum()), 0.0) / (float(power.sum()) or 1.0))
