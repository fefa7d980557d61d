"""The compiled steps of the sign search; `sign_search.steps` and `sign_search.levels` define them."""

from functools import partial

import torch
from bwla_kernels.checks import expect_sign_step
from bwla_kernels.cpu.library import Isa, available, load
from bwla_kernels.cpu.linear import CPU, STATUS
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
    planes: bool = False,
) -> None:
    """Choose the signs of a block by error feedback; arguments as in `choose_signs_reference`, all contiguous.

    Args:
        isa: variant of the kernel; by default the loaded one.
        threads: threads to use; by default torch's number. Rows are independent: results do not depend on it.
        planes: whether the tensors hold the planes of one candidate, as in `sign_search.levels`, instead of candidates.

    Raises:
        BackendError: a tensor has another shape, dtype or layout.
    """
    tensors = {
        "target": target,
        "product": product,
        "factor": factor,
        "pivots": pivots,
        "scale": scale,
        "sign": sign,
    }
    _run({**tensors, "dots": dots, "norms": norms}, isa, threads, planes)


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
    planes: bool = False,
) -> None:
    """Sweep through all signs; arguments as in `sweep_signs_reference` and `choose_signs`."""
    tensors = {
        "target": target,
        "product": product,
        "hessian": hessian,
        "scale": scale,
        "sign": sign,
        "change": change,
    }
    _run({**tensors, "dots": dots, "norms": norms}, isa, threads, planes)


choose_levels = partial(choose_signs, planes=True)
sweep_levels = partial(sweep_signs, planes=True)


def _run(tensors: dict[str, Tensor], isa: Isa | None, threads: int | None, planes: bool) -> None:
    """Check the arguments of a step, and call the library."""
    sizes = columns, _, rows = expect_sign_step(tensors, CPU, planes)
    matrix = "factor" if "factor" in tensors else "hessian"
    names = ("target", "product", matrix, "pivots", "scale", "sign", "change", "dots", "norms")
    library = load()
    status = library.handle.bwla_sign_step(
        library.isa if isa is None else isa,
        *(tensors[name].data_ptr() if name in tensors else None for name in names),
        *sizes,
        len(tensors["scale"]) if planes else 0,
        torch.get_num_threads() if threads is None else threads,
    )
    if status:
        raise BackendError(
            f"the CPU kernel refused {rows} rows of {columns} columns: {STATUS.get(status, status)}"
        )
