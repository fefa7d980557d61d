"""The compiled steps of the search for several planes agree with the reference implementations in every variant."""

import pytest
import torch
from bwla_kernels.cpu.library import Isa
from bwla_kernels.cpu.sign_steps import choose_levels, sweep_levels
from bwla_kernels.errors import BackendError
from bwla_kernels.sign_search.levels import choose_levels_reference, sweep_levels_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

SHAPES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scales(planes: int, rows: int, generator: torch.Generator) -> Tensor:
    halves = 0.5 ** torch.arange(planes, dtype=torch.float32).unsqueeze(1)
    return halves * (0.8 + 0.4 * torch.rand(planes, rows, generator=generator))


def choice(rows: int, columns: int, planes: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.eye(columns) + torch.randn(columns, columns, generator=generator).triu(1) / columns**0.5
    return (
        torch.randn(columns, rows, generator=generator),
        torch.randn(columns, planes, rows, generator=generator),
        factor,
        torch.rand(columns, generator=generator) + 0.5,
        scales(planes, rows, generator),
        torch.empty(columns, planes, rows),
        torch.rand(planes, rows, generator=generator),
        torch.rand(planes, planes, rows, generator=generator),
    )


def descent(rows: int, columns: int, planes: int, seed: int) -> list[Tensor]:
    """Return target, product, H, scale, sign, change, dots and norms."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix
    hessian = inputs.mT @ inputs / len(inputs) + 0.01 * torch.eye(columns)
    rest = torch.randn(columns, rows, generator=generator)
    target, scale, sign = hessian @ rest, scales(planes, rows, generator), torch.empty(columns, planes, rows)
    for plane in range(planes):
        noisy = rest + 0.3 * torch.randn(columns, rows, generator=generator)
        sign[:, plane] = torch.where(noisy >= 0, 1.0, -1.0)
        rest = rest - scale[plane] * sign[:, plane]
    product = (hessian @ sign.flatten(1)).view_as(sign)
    dots = (sign * target.unsqueeze(1)).sum(0)
    norms = (sign.unsqueeze(2) * product.unsqueeze(1)).sum(0)
    return [target, product, hessian, scale, sign, torch.zeros_like(sign), dots, norms]


@SHAPES
@given(
    rows=st.integers(1, 100),
    words=st.integers(1, 8),
    planes=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(list(Isa)),
)
def test_error_feedback_agrees_with_the_reference(
    rows: int, words: int, planes: int, seed: int, isa: Isa, variants: list[Isa]
) -> None:
    if isa not in variants:
        return
    expected = choice(rows, 32 * words, planes, seed)
    found = tuple(tensor.clone() for tensor in expected)
    choose_levels_reference(*expected)
    choose_levels(*found, isa=isa, threads=1)
    # Rows in which no choice was a tie within rounding have the same signs.
    same = (found[5] == expected[5]).flatten(0, 1).all(0)
    assert same.float().mean() > 0.9
    for tensor in (6, 7):
        torch.testing.assert_close(
            found[tensor][..., same], expected[tensor][..., same], rtol=1e-3, atol=1e-3
        )


@SHAPES
@given(
    rows=st.integers(1, 60),
    words=st.integers(1, 8),  # one block: between blocks the reference may round its products to bfloat16
    planes=st.integers(2, 4),
    sweeps=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(list(Isa)),
)
def test_sweeps_agree_with_the_reference(
    rows: int, words: int, planes: int, sweeps: int, seed: int, isa: Isa, variants: list[Isa]
) -> None:
    if isa not in variants:
        return
    expected = descent(rows, 32 * words, planes, seed)
    found = [tensor.clone() for tensor in expected]
    for _ in range(sweeps):
        sweep_levels_reference(*expected)
        sweep_levels(*found, isa=isa, threads=1)
    same = (found[4] == expected[4]).flatten(0, 1).all(0)
    assert same.float().mean() > 0.8
    for tensor in (5, 6, 7):
        torch.testing.assert_close(
            found[tensor][..., same], expected[tensor][..., same], rtol=1e-2, atol=1e-2
        )


def test_wide_rows_keep_their_sums(isa: Isa) -> None:
    """More columns than a block: dots, norms and the error are those of the signs."""
    target, product, hessian, scale, sign, change, dots, norms = descent(20, 320, 3, 7)
    for _ in range(3):
        before = ((norms * scale).sum(1) * scale).sum(0) - 2 * (scale * dots).sum(0)
        sweep_levels(target, product, hessian, scale, sign, change, dots, norms, isa=isa, threads=1)
        torch.testing.assert_close(dots, (sign * target.unsqueeze(1)).sum(0), rtol=1e-3, atol=1e-2)
        exact = (hessian @ sign.flatten(1)).view_as(sign)
        torch.testing.assert_close(
            norms, (sign.unsqueeze(2) * exact.unsqueeze(1)).sum(0), rtol=1e-3, atol=1e-1
        )
        after = ((norms * scale).sum(1) * scale).sum(0) - 2 * (scale * dots).sum(0)
        assert bool((after <= before + 1e-2).all())


def test_the_number_of_threads_changes_nothing() -> None:
    alone, together = descent(90, 96, 2, 5), descent(90, 96, 2, 5)
    sweep_levels(*alone, threads=1)
    sweep_levels(*together, threads=3)
    assert all(torch.equal(first, second) for first, second in zip(alone, together, strict=True))


def test_norms_of_another_shape_are_refused() -> None:
    arguments = list(choice(4, 32, 2, 0))
    arguments[-1] = arguments[-1][0].contiguous()
    with pytest.raises(BackendError, match=r"norms: expected contiguous torch.float32 \[2, 2, 4\]"):
        choose_levels(*arguments)
