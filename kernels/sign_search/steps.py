"""The sequential steps of the sign search, as ops.

`choose_signs` and `flip_signs` walk through the columns of a block, `sweep_signs` through all columns. Rows are
independent. Tensors are transposed, [K, C, N]: a vector of rows is contiguous. C are the candidates of a row, which
share what belongs to the weight, [K, N].

The functions here define the results. On a CPU, `cpu.sign_steps` computes error feedback in a block and whole sweeps,
whose work is proportional to the flips. On a GPU, `triton.sign_steps` computes both steps in a block; the products that
bring the other columns up to date are torch's. Compiled kernels sum in another order, so they may choose the other sign
where both are almost equally good.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from bwla_kernels.cpu import sign_steps as cpu
from bwla_kernels.precision import fast_products
from bwla_kernels.triton import sign_steps as triton
from torch import Tensor

log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LIBRARY.define(
    "choose_signs(Tensor target, Tensor(a!) product, Tensor factor, Tensor pivots, Tensor scale, Tensor(b!) sign, "
    "Tensor(c!) dots, Tensor(d!) norms) -> ()"
)
for _name in ("flip_signs", "sweep_signs"):
    _LIBRARY.define(
        f"{_name}(Tensor target, Tensor(a!) product, Tensor hessian, Tensor scale, Tensor(b!) sign, Tensor(c!) change, "
        "Tensor(d!) dots, Tensor(e!) norms) -> ()"
    )


def blocks(columns: int, device: torch.device) -> Iterator[slice]:
    """Yield the blocks of some columns: as many as the compiled steps take at once.

    Wider blocks make the products between them more efficient, but within a block the work is quadratic.
    """
    width = cpu.MOST_COLUMNS if device.type == "cpu" else triton.MOST_COLUMNS
    for begin in range(0, columns, width):
        yield slice(begin, min(begin + width, columns))


def choose_signs_reference(
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
        product: in: the sum over the columns before the block of s_i M_ij, [B, C, N]; out: undefined.
        factor: M within the block, [B, B].
        pivots: d of the block, [B].
        scale: a, [C, N].
        sign: out: s, [B, C, N].
        dots: the block's part of s H w^T is added, [C, N].
        norms: the block's part of s H s^T is added, [C, N].
    """
    for j in range(len(sign)):
        sign[j] = torch.where(target[j] - scale * product[j] >= 0, 1.0, -1.0)
        product[j:] += factor[j, j:, None, None] * sign[j]
        dots += pivots[j] * target[j] * product[j]
        norms += pivots[j] * product[j].square()


def flip_signs_reference(
    target: Tensor,
    product: Tensor,
    hessian: Tensor,
    scale: Tensor,
    sign: Tensor,
    change: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Visit every sign of a block once and flip it if that lowers f. All tensors are float32.

    With g = (a s - w) H, flipping s_j changes f by 4 a (a H_jj - s_j g_j).

    Args:
        target: H w of the block, [B, N].
        product: H s of the block, [B, C, N], in and out.
        hessian: H within the block, [B, B].
        scale: a, [C, N].
        sign: s, [B, C, N], in and out.
        change: out: new minus old signs, [B, C, N].
        dots: s H w^T, [C, N], in and out.
        norms: s H s^T, [C, N], in and out.
    """
    for j in range(len(sign)):
        gain = sign[j] * (scale * product[j] - target[j]) - scale * hessian[j, j]
        change[j] = torch.where(gain > 0, -2.0 * sign[j], 0.0)
        dots += change[j] * target[j]
        norms += change[j] * (2.0 * product[j] + change[j] * hessian[j, j])
        sign[j] += change[j]
        product += hessian[j, :, None, None] * change[j]


def sweep_signs_reference(
    target: Tensor,
    product: Tensor,
    hessian: Tensor,
    scale: Tensor,
    sign: Tensor,
    change: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Visit every sign once, block by block, and flip it if that lowers f. All tensors are float32.

    Args:
        target: H w, [K, N].
        product: H s, [K, C, N], in and out, but for `change`: a block receives it only when it is visited.
        hessian: H, [K, K].
        scale: a, [C, N].
        sign: s, [K, C, N], in and out.
        change: new minus old signs, [K, C, N]; in: of the last sweep, out: of this one.
        dots: s H w^T, [C, N], in and out.
        norms: s H s^T, [C, N], in and out.
    """
    for block in blocks(len(target), target.device):
        # Of the columns before the block, `change` is this sweep's; of those after it, the last sweep's. The block's
        # own is in `product` already.
        change[block] = 0.0
        with fast_products(hessian.device):
            product[block].flatten(1).addmm_(hessian[block], change.flatten(1))
        torch.ops.bwla.flip_signs(
            target[block],
            product[block],
            hessian[block, block].contiguous(),
            scale,
            sign[block],
            change[block],
            dots,
            norms,
        )


def register_step(name: str, device: str, reference: Callable[..., None], backend: ModuleType) -> None:
    """Register a backend's step for a device type; where it cannot run, the reference does, with a warning."""
    step = getattr(backend, name)

    def run(target: Tensor, *others: Tensor) -> None:
        able, reason = backend.can_run(target.device, len(target))
        if not able:
            _warn_slow(reason)
        (step if able else reference)(target, *others)

    _LIBRARY.impl(name, run, device)


@functools.cache
def _warn_slow(reason: str) -> None:
    log.warning(
        "signs are searched by the reference implementation, which is several times slower: %s", reason
    )


def _fake(*_: Tensor) -> None:
    return None


for _name in ("choose_signs", "flip_signs", "sweep_signs"):
    torch.library.register_fake(f"bwla::{_name}", _fake, lib=_LIBRARY)
register_step("choose_signs", "CPU", choose_signs_reference, cpu)
register_step("sweep_signs", "CPU", sweep_signs_reference, cpu)
register_step("choose_signs", "CUDA", choose_signs_reference, triton)
register_step("flip_signs", "CUDA", flip_signs_reference, triton)
# A sweep is made of the flips in its blocks.
_LIBRARY.impl("flip_signs", flip_signs_reference, "CPU")
_LIBRARY.impl("sweep_signs", sweep_signs_reference, "CUDA")
