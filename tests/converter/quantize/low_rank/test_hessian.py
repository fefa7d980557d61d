"""The low-rank correction with the smallest output error, against a full singular value decomposition."""

import pytest
import torch
from bwla_converter.quantize.low_rank.hessian import hessian_low_rank


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_nearly_the_truncated_svd(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(60, 60, generator=generator), torch.randn(60, 40, generator=generator)
    error = left * torch.logspace(0, -2, 60) @ right
    mix = torch.randn(40, 40, generator=generator)
    hessian = mix @ mix.mT / 40 + 0.05 * torch.eye(40)
    lower = torch.linalg.cholesky(hessian)
    values = torch.linalg.svdvals(error @ lower)
    b, a = hessian_low_rank(error, hessian, rank, torch.Generator().manual_seed(1))
    assert (b.shape, a.shape) == ((60, rank), (rank, 40))
    torch.testing.assert_close(b.mT @ b, torch.eye(rank), rtol=0, atol=1e-5)
    rest = ((error - b @ a) @ lower).square().sum()
    assert rest <= values[rank:].square().sum() * 1.01


def test_rank_zero_is_empty() -> None:
    b, a = hessian_low_rank(torch.ones(3, 4), torch.eye(4), 0, torch.Generator())
    assert (b.shape, a.shape) == ((3, 0), (0, 4))
