"""The compiled steps of the sign search; `sign_search.steps` has the reference implementations and their arguments."""

import torch
from bwla_kernels.cpu.library import Isa, available, load
from bwla_kernels.cpu.linear import STATUS, expect
from bwla_kernels.errors import BackendError
from torch import Tensor

MOST_COLUMNS = 256
"""Columns of a block of error feedback, at most."""

COLUMN_STEP = 32
"""The columns must be a multiple of this, as in the checkpoint format: a strip has up to 16 whole columns."""


def can_run(device: torch.device, columns: int) -> tuple[bool, str]:
    """Return whether the compiled kernel can run on `device` for some `columns`, and the reason if not."""
    if device.type != "cpu":
        return False, f"the compiled kernel runs on the CPU, not on {device}"
    if columns % COLUMN_STEP:
        return False, f"{columns} columns are not a multiple of {COLUMN_STEP}"
    return available()


def choose_signs(
    target: Tensor,
    product: Tensor,
    factor: Tensor,
    pivots: Tensor,
    scale: Tensor,
    sign: Tensor,
    dots: Tensor,
    norms: Tensor,
    isa: Isa | None = None,
    threads: int | None = None,
) -> None:
    """Choose the signs of a block by error feedback; arguments as in `choose_signs_reference`, all contiguous.

    Args:
        isa: variant of the kernel; by default the loaded one.
        threads: threads to use; by default torch's number. Rows are independent: results do not depend on it.

    Raises:
        BackendError: a tensor has another shape, dtype or layout.
    """
    expect("pivots", pivots, torch.float32, (len(target),))
    _step(target, product, factor, pivots, scale, sign, None, dots, norms, isa, threads)


def sweep_signs(
    target: Tensor,
    product: Tensor,
    hessian: Tensor,
    scale: Tensor,
    sign: Tensor,
    change: Tensor,
    dots: Tensor,
    norms: Tensor,
    isa: Isa | None = None,
    threads: int | None = None,
) -> None:
    """Sweep through all signs; arguments as in `sweep_signs_reference` and `choose_signs`."""
    expect("change", change, torch.float32, tuple(sign.shape))
    _step(target, product, hessian, None, scale, sign, change, dots, norms, isa, threads)


def _step(
    target: Tensor,
    product: Tensor,
    matrix: Tensor,
    pivots: Tensor | None,
    scale: Tensor,
    sign: Tensor,
    change: Tensor | None,
    dots: Tensor,
    norms: Tensor,
    isa: Isa | None,
    threads: int | None,
) -> None:
    columns, rows = target.shape
    candidates = len(scale)
    expect("target", target, torch.float32, (columns, rows))
    expect("the factor or Hessian", matrix, torch.float32, (columns, columns))
    for name, tensor in (("product", product), ("sign", sign)):
        expect(name, tensor, torch.float32, (columns, candidates, rows))
    for name, tensor in (("scale", scale), ("dots", dots), ("norms", norms)):
        expect(name, tensor, torch.float32, (candidates, rows))
    library = load()
    status = library.handle.bwla_sign_step(
        library.isa if isa is None else isa,
        target.data_ptr(), product.data_ptr(), matrix.data_ptr(), None if pivots is None else pivots.data_ptr(),
        scale.data_ptr(), sign.data_ptr(), None if change is None else change.data_ptr(),
        dots.data_ptr(), norms.data_ptr(), columns, candidates, rows,
        torch.get_num_threads() if threads is None else threads,
    )  # fmt: skip
    if status:
        raise BackendError(
            f"the CPU kernel refused {rows} rows of {columns} columns: {STATUS.get(status, status)}"
        )
