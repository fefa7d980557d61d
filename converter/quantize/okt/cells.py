"""Means over cells, the layout of rotated rows that both Procrustes sums are matrix products in.

Cells are float32 [P, N, Q]: row i is cells[:, i].
"""

from collections.abc import Sequence

from torch import Tensor


def rows_mean(cells: Tensor) -> Tensor:
    """Return the mean of cells [P, N, Q] over all axes but the row axis, float64 [N]."""
    return cells.sum(-1).double().sum(0) / (cells.shape[0] * cells.shape[2])


def mean_of_rows(values: Sequence[Tensor], selected: Sequence[Tensor]) -> float:
    """Return the mean of the selected values; 0 if none is.

    Args:
        values: float64 [N_i] each.
        selected: bool [N_i] each.
    """
    total = sum(float(rows[mask].sum()) for rows, mask in zip(values, selected, strict=True))
    return total / max(sum(int(mask.sum()) for mask in selected), 1)
