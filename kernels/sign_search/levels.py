"""The sequential steps of the search for several planes, as ops.

A row with the scales a_p approximates its weight in column j by v_j = sum_p a_p s_pj, one of 2^P levels. Error feedback
chooses the level nearest to the weight to which all earlier errors have been fed back; coordinate descent moves a
column to the level with the smallest error while all other columns stay. Both change the signs of all planes together:
descent that flips a single sign at a time cannot move from a level to the next where two signs differ.

As in `steps`, tensors are transposed, [K, P, N], the functions here define the results, and a compiled kernel on the
CPU computes the same but for ties and the order of sums. On other devices the reference implementation runs.
"""

import torch
from bwla_kernels.cpu import sign_steps as cpu
from bwla_kernels.precision import fast_products
from bwla_kernels.sign_search.steps import blocks, register_step
from torch import Tensor

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LIBRARY.define(
    "choose_levels(Tensor target, Tensor(a!) product, Tensor factor, Tensor pivots, Tensor scale, Tensor(b!) sign, "
    "Tensor(c!) dots, Tensor(d!) norms) -> ()"
)
_LIBRARY.define(
    "sweep_levels(Tensor target, Tensor(a!) product, Tensor hessian, Tensor scale, Tensor(b!) sign, "
    "Tensor(c!) change, Tensor(d!) dots, Tensor(e!) norms) -> ()"
)


def nearest_level(wanted: Tensor, scale: Tensor, sign: Tensor, distance: Tensor) -> Tensor:
    """Return the signs of the levels nearest to `wanted`, float32 [P, N].

    Args:
        wanted: [N].
        scale: a, [P, N].
        sign: kept where no level is nearer than `distance`, [P, N].
        distance: squared distance of `wanted` from the level of `sign`, [N]; infinity to choose among all levels.
    """
    for code in range(2 ** len(scale)):
        level = torch.tensor([1.0 if code >> p & 1 else -1.0 for p in range(len(scale))], device=scale.device)
        other = (wanted - (level.unsqueeze(1) * scale).sum(0)).square()
        sign = torch.where(other < distance, level.unsqueeze(1), sign)
        distance = torch.minimum(distance, other)
    return sign


def choose_levels_reference(
    target: Tensor,
    product: Tensor,
    factor: Tensor,
    pivots: Tensor,
    scale: Tensor,
    sign: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Choose the signs of a block by error feedback, see `metric`. All tensors are float32.

    Args:
        target: p of the block, [B, N].
        product: in: the sums over the columns before the block of s_pi M_ij, [B, P, N]; out: undefined.
        factor: M within the block, [B, B].
        pivots: d of the block, [B].
        scale: a, [P, N].
        sign: out: s, [B, P, N].
        dots: the block's part of s_p H w^T is added, [P, N].
        norms: the block's part of s_p H s_q^T is added, [P, P, N].
    """
    for j in range(len(sign)):
        wanted = target[j] - (scale * product[j]).sum(0)
        sign[j] = nearest_level(
            wanted, scale, torch.full_like(scale, -1.0), torch.full_like(wanted, float("inf"))
        )
        product[j:] += factor[j, j:, None, None] * sign[j]
        dots += pivots[j] * target[j] * product[j]
        norms += pivots[j] * product[j].unsqueeze(1) * product[j]


def sweep_levels_reference(
    target: Tensor,
    product: Tensor,
    hessian: Tensor,
    scale: Tensor,
    sign: Tensor,
    change: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Visit every column once, block by block, and move it to the best level. All tensors are float32.

    With g = (v - w) H, the best value of column j is v_j - g_j / H_jj.

    Args:
        target: H w, [K, N].
        product: H s, [K, P, N], in and out, but for `change`: a block receives it only when it is visited.
        hessian: H, [K, K].
        scale: a, [P, N].
        sign: s, [K, P, N], in and out.
        change: new minus old signs, [K, P, N]; in: of the last sweep, out: of this one.
        dots: s_p H w^T, [P, N], in and out.
        norms: s_p H s_q^T, [P, P, N], in and out.
    """
    for block in blocks(len(target), target.device):
        change[block] = 0.0
        with fast_products(hessian.device):
            product[block].flatten(1).addmm_(hessian[block], change.flatten(1))
        for j in range(block.start, block.stop):
            step = ((scale * product[j]).sum(0) - target[j]) / hessian[j, j]
            value = (scale * sign[j]).sum(0)
            change[j] = nearest_level(value - step, scale, sign[j], step.square()) - sign[j]
            both = change[j].unsqueeze(1) * product[j]
            dots += change[j] * target[j]
            norms += both + both.transpose(0, 1) + hessian[j, j] * change[j].unsqueeze(1) * change[j]
            sign[j] += change[j]
            product[block] += hessian[block, j, None, None] * change[j]


for _name, _reference in (
    ("choose_levels", choose_levels_reference),
    ("sweep_levels", sweep_levels_reference),
):
    torch.library.register_fake(f"bwla::{_name}", lambda *_: None, lib=_LIBRARY)
    for _device in ("CPU", "CUDA"):
        register_step(_name, _device, _reference, cpu)

choose_levels = torch.ops.bwla.choose_levels.default
sweep_levels = torch.ops.bwla.sweep_levels.default
