"""The compiled kernel of one-bit GPTQ agrees with the reference implementation in every variant."""

import pytest
import torch
from bwla_kernels.cpu.gptq_binary import can_binarize, gptq_binarize
from bwla_kernels.cpu.library import Isa
from bwla_kernels.errors import BackendError
from bwla_kernels.gptq_binary import (
    INITIAL_SCALE_FACTORS,
    BinaryWeight,
    binarize_reference,
    inverse_cholesky,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian rows, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix
    hessian = inputs.mT @ inputs / len(inputs)
    return torch.randn(rows, columns, generator=generator), hessian + 0.01 * torch.eye(columns)


def binarize(
    weight: Tensor,
    hessian: Tensor,
    sweeps: int,
    refine_all: bool,
    feedback: bool = True,
    isa: Isa | None = None,
    threads: int = 1,
) -> BinaryWeight:
    factor = inverse_cholesky(hessian).contiguous() if feedback else None
    return BinaryWeight(
        *gptq_binarize(
            weight, weight @ hessian, hessian, factor, INITIAL_SCALE_FACTORS, sweeps, refine_all, isa, threads
        )
    )


def error(weight: Tensor, binary: BinaryWeight, hessian: Tensor) -> Tensor:
    rest = (weight - binary.dequantize()).double()
    return ((rest @ hessian.double()) * rest).sum(1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 150),
    chunks=st.integers(1, 10),
    sweeps=st.integers(0, 5),
    refine_all=st.booleans(),
    feedback=st.booleans(),
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(list(Isa)),
)
def test_random_shapes_agree_with_the_reference(
    rows: int,
    chunks: int,
    sweeps: int,
    refine_all: bool,
    feedback: bool,
    seed: int,
    isa: Isa,
    variants: list[Isa],
) -> None:
    if isa not in variants:
        return
    weight, hessian = problem(rows, 32 * chunks, seed)
    expected = binarize_reference(weight, hessian, inverse_cholesky(hessian), sweeps, feedback, refine_all)
    found = binarize(weight, hessian, sweeps, refine_all, feedback, isa)
    # Rows in which no choice was a tie within rounding have the same signs; the others are as good.
    same = (found.sign == expected.sign).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found.scale[same], expected.scale[same], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.error.double(), error(weight, found, hessian), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.error.sum(), expected.error.sum(), rtol=1e-2, atol=1e-3)


def test_rows_do_not_depend_on_their_neighbours_or_on_threads(isa: Isa) -> None:
    weight, hessian = problem(70, 96, seed=1)
    whole = binarize(weight, hessian, 3, True, isa=isa)
    for threads in (2, 3):
        again = binarize(weight, hessian, 3, True, isa=isa, threads=threads)
        assert torch.equal(whole.sign, again.sign)
        assert torch.equal(whole.error, again.error)
    part = binarize(weight[33:50].clone(), hessian, 3, True, isa=isa)
    assert torch.equal(part.sign, whole.sign[33:50])


def test_no_single_flip_lowers_the_error_of_a_finished_row(isa: Isa) -> None:
    weight, hessian = problem(20, 64, seed=2)
    found = binarize(weight, hessian, 50, False, isa=isa)
    base = error(weight, found, hessian)
    for j in range(64):
        flipped = found.sign.clone()
        flipped[:, j] *= -1
        changed = BinaryWeight(flipped, found.scale, found.error)
        assert bool((error(weight, changed, hessian) >= base * (1 - 1e-5)).all())


def test_a_row_of_zeros_is_harmless(isa: Isa) -> None:
    weight, hessian = problem(5, 64, seed=3)
    weight[2] = 0
    found = binarize(weight, hessian, 2, True, isa=isa)
    assert torch.isfinite(found.scale).all()
    assert float(found.error[2]) <= 1e-6


def test_what_does_not_fit_is_refused() -> None:
    weight, hessian = problem(4, 64, seed=4)
    with pytest.raises(BackendError, match="multiple of 32 columns"):
        binarize(weight[:, :40].clone(), hessian[:40, :40].clone(), 1, False)
    with pytest.raises(BackendError, match="weight_hessian: expected contiguous"):
        gptq_binarize(weight, weight.half(), hessian, None, (1.0,), 1, False)
    assert can_binarize(weight[:, :40]) == (False, "40 columns are not a multiple of 32")
    assert "on the CPU, not on meta" in can_binarize(weight.to("meta"))[1]
