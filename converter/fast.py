"""Recipe `fast`: one input group in the metric of its inputs, in closed form (no gradients).

What is minimised is the output error E||W x - W' x_hat||^2, with x the inputs that the original model gives the
group and x_hat those that the blocks quantized so far give it. The best unquantized W' is
W E[x x_hat^T] E[x_hat x_hat^T]^-1 (as in GPTAQ, arXiv 2504.02692): it also makes good what earlier blocks lost. It
takes the original's place as the target; then, in the basis of OKT's rotation and the metric H = E[x_hat x_hat^T]:
the low-rank part (`metric_low_rank`), signs by error feedback and coordinate descent, least-squares row scales
(`error_feedback`), alternated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_converter.error_feedback import Code, inverse_factor, one_bit
from bwla_converter.group import GroupResult, check_group, group_generator, pool_rows, store_group
from bwla_converter.hessian import Moments, rotate_metric
from bwla_converter.metric_low_rank import metric_low_rank
from bwla_converter.okt import learn_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import rotate, rotate_back
from torch import Tensor


@dataclass(frozen=True)
class FastOptions:
    """What the recipe leaves open.

    Attributes:
        okt_rounds: rounds of the rotation; 0 leaves it at its random start.
        rounds: alternations of low-rank part and signs.
        sweeps: sweeps of coordinate descent after each error feedback.
        damping: added to H's diagonal, in units of its mean.
        target_damping: pull of the target towards the original weight, in the same units; infinity keeps the
            original weight.
    """

    okt_rounds: int = 40
    rounds: int = 3
    sweeps: int = 2
    damping: float = 0.01
    target_damping: float = 0.1


def corrected_target(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """(W C + d W) (H + d)^-1 with C = E[x x_hat^T], H = E[x_hat x_hat^T], d = `damping` times H's mean diagonal.

    Args:
        weight: float32 [N, K].
        moments: of the group's inputs.
        damping: see `FastOptions.target_damping`.

    Returns: float32 [N, K]; `weight` itself where the original's inputs were not followed.
    """
    if moments.crossed is None or damping == float("inf"):
        return weight
    hessian = moments.hessian(damping)
    ridge = hessian - moments.seen / moments.count
    wanted = weight @ (moments.crossed / moments.count + ridge)
    lower = torch.linalg.cholesky(hessian.double())
    return torch.cholesky_solve(wanted.double().mT, lower).mT.float()


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    moments: Moments,
    *,
    seed: int = 0,
    options: FastOptions | None = None,
) -> GroupResult:
    """Quantize the linears that read one input.

    Holds a few float32 copies of the group's weights and of H. Time grows as N K^2.

    Args:
        weights: module name -> W [N_i, K], any float dtype, one device. The order of the names matters.
        specs: module name -> what to make of it; one input side (K, rotation sizes, rank, bits, clip).
        moments: of the group's inputs, on the same device.
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
        [target], (side.blocks, side.n1, side.n2), rounds=options.okt_rounds, generator=generator
    )
    basis = (rotation.left, rotation.right)
    target, hessian = rotate(target, *basis), rotate_metric(hessian, *basis)
    factor = inverse_factor(hessian)
    power = ((target @ hessian) * target).sum(1)
    shared = {
        "rotation_left": rotation.left,
        "rotation_right": rotation.right,
        "column_scale": torch.ones(side.in_features, device=target.device),
    }
    code: Code | None = None
    residual, low_rank_b, trace = target, target.new_zeros(len(target), 0, dtype=torch.bfloat16), []
    for _ in range(options.rounds if side.rank else 1):
        if side.rank:
            rest = target if code is None else target - code.scale.unsqueeze(1) * code.sign
            b, a = metric_low_rank(rest, hessian, side.rank, generator)
            # Rounded as they are stored, so that the signs make good for that too.
            low_rank_b, shared["low_rank_a"] = b.bfloat16(), rotate_back(a, *basis).bfloat16()
            residual = target - low_rank_b.float() @ rotate(shared["low_rank_a"], *basis)
        code = one_bit(residual, hessian, factor, options.sweeps)
        trace.append(_relative(code.error, power))
    assert code is not None
    tensors = store_group(weights, specs, {}, shared, code.sign, code.scale, low_rank_b)
    rows = [len(weight) for weight in weights.values()]
    pairs = zip(weights, code.error.split(rows), power.split(rows), strict=True)
    errors = {name: _relative(lost, of) for name, lost, of in pairs}
    return GroupResult(tensors, errors, {"okt": rotation.trace, "output": trace})


def _relative(lost: Tensor, power: Tensor) -> float:
    """Root of the share of the power that is lost; 0 where there is none."""
    return math.sqrt(max(float(lost.sum()), 0.0) / (float(power.sum()) or 1.0))
