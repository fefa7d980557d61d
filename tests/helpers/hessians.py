"""Weights and Hessians for the tests of the sign search."""

import torch
from torch import Tensor


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return Gaussian rows [rows, columns] and a Hessian [columns, columns] with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    hessian = mix @ mix.mT / columns + 0.02 * torch.eye(columns)
    return torch.randn(rows, columns, generator=generator), hessian
