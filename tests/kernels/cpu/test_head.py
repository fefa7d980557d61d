"""The compiled 8-bit head: every variant equals the reference implementation to the last bit, whatever the shape."""

import random

import pytest
import torch
from bwla_kernels.cpu.head import CpuHead, head
from bwla_kernels.cpu.library import Isa
from bwla_kernels.errors import BackendError
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import head_reference, quantize_head

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prepared(rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    stored = quantize_head(torch.randn(rows, columns, generator=generator))
    return CpuHead().prepare(stored, HeadSpec(rows, columns))


def expected(x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return head_reference(x, tensors["weight_int8"], tensors["weight_scale"])


def test_random_shapes_equal_the_definition(isa: Isa) -> None:
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    for _ in range(150):
        rows, columns, tokens = rng.randint(1, 150), rng.randint(1, 400), rng.randint(0, 70)
        tensors = prepared(rows, columns, generator)
        x = (torch.randn(tokens, columns, generator=generator) * 3).to(rng.choice(DTYPES))
        y = head(x, **tensors, isa=isa, threads=-rng.randint(1, 5))
        assert torch.equal(y, expected(x, tensors)), (rows, columns, tokens, x.dtype)


@pytest.mark.parametrize("columns", [4096, 4112, 8200, 65536])
def test_largest_sums_do_not_overflow(columns: int, isa: Isa) -> None:
    weight = torch.full((5, columns), 127, dtype=torch.int8)
    weight[1], weight[2] = -127, -128
    weight[3, ::2] = -127
    row_sum = weight.sum(1, dtype=torch.int32)
    for sign in (1.0, -1.0):
        x = torch.full((9, columns), sign)
        y = head(x, weight, torch.ones(5), row_sum, isa=isa)
        assert torch.equal(y, head_reference(x, weight, torch.ones(5)))


def test_strided_rows_and_leading_axes(isa: Isa) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = prepared(70, 96, generator)
    wide = torch.randn(6, 200, generator=generator)
    for x in (wide[:, 3:99], wide[::2, :96], wide[:, :96].reshape(2, 3, 96), wide[0, :96]):
        assert torch.equal(head(x, **tensors, isa=isa), expected(x, tensors))


def test_not_a_number_stays_in_its_row(isa: Isa) -> None:
    generator = torch.Generator().manual_seed(6)
    tensors = prepared(40, 64, generator)
    x = torch.randn(3, 64, generator=generator)
    x[1, 5] = float("nan")
    y = head(x, **tensors, isa=isa)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], expected(x[::2], tensors))


def test_misfits_are_refused(isa: Isa) -> None:
    tensors = prepared(40, 64, torch.Generator().manual_seed(7))
    with pytest.raises(BackendError, match="x: expected"):
        head(torch.zeros(1, 32), **tensors, isa=isa)
    with pytest.raises(BackendError, match="x: expected"):
        head(torch.zeros(1, 64, dtype=torch.float64), **tensors, isa=isa)
    with pytest.raises(BackendError, match="row_sum"):
        head(torch.zeros(1, 64), **{**tensors, "row_sum": tensors["row_sum"][:3]}, isa=isa)


def test_too_wide_is_not_implemented() -> None:
    able, reason = CpuHead().can_implement(HeadSpec(8, 65568), torch.device("cpu"))
    assert not able
    assert "65568" in reason
