"""The compiled steps of the search for several planes; `sign_search.levels` has the reference implementations."""

from bwla_kernels.cpu.library import Isa
from bwla_kernels.cpu.sign_steps import can_run, run_step
from torch import Tensor

__all__ = ["can_run", "choose_levels", "sweep_levels"]


def choose_levels(
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
    """Choose the signs of a block; arguments as in `choose_levels_reference`, all contiguous.

    Args:
        isa: variant of the kernel; by default the loaded one.
        threads: threads to use; by default torch's number. Rows are independent: results do not depend on it.

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
    run_step({**tensors, "dots": dots, "norms": norms}, isa, threads, planes=len(scale))


def sweep_levels(
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
    """Sweep through all columns; arguments as in `sweep_levels_reference` and `choose_levels`."""
    tensors = {
        "target": target,
        "product": product,
        "hessian": hessian,
        "scale": scale,
        "sign": sign,
        "change": change,
    }
    run_step({**tensors, "dots": dots, "norms": norms}, isa, threads, planes=len(scale))
