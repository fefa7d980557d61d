"""The compiled steps of the sign search agree with the reference implementations in every variant."""

from dataclasses import dataclass, fields

import pytest
import torch
from bwla_kernels.cpu.library import Isa
from bwla_kernels.cpu.sign_steps import can_run, choose_signs, sweep_signs
from bwla_kernels.errors import BackendError
from bwla_kernels.sign_search.steps import choose_signs_reference, flip_signs_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Problem:
    """Arguments of both steps: random signs, and what belongs to them."""

    target: Tensor
    product: Tensor
    hessian: Tensor
    scale: Tensor
    sign: Tensor
    change: Tensor
    dots: Tensor
    norms: Tensor

    def copy(self) -> "Problem":
        return Problem(*(getattr(self, field.name).clone() for field in fields(self)))

    def rows(self, begin: int, end: int) -> "Problem":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Problem(
            **{n: t if n == "hessian" else t[..., begin:end].contiguous() for n, t in tensors.items()}
        )

    def sweep(self, isa: Isa | None = None, threads: int = 1) -> "Problem":
        sweep_signs(*(getattr(self, field.name) for field in fields(self)), isa=isa, threads=threads)
        return self

    def sweep_reference(self) -> "Problem":
        flip_signs_reference(*(getattr(self, field.name) for field in fields(self)))
        return self


def problem(rows: int, columns: int, candidates: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix
    hessian = inputs.mT @ inputs / len(inputs) + 0.01 * torch.eye(columns)
    weight = torch.randn(columns, rows, generator=generator)
    target = hessian @ weight
    # Most signs are the weight's, so that a few flip.
    noise = 0.3 * torch.randn(columns, candidates, rows, generator=generator)
    sign = torch.where(weight.unsqueeze(1) + noise >= 0, 1.0, -1.0)
    product = (hessian @ sign.flatten(1)).view_as(sign)
    dots, norms = (sign * target.unsqueeze(1)).sum(0), (sign * product).sum(0)
    return Problem(target, product, hessian, dots / norms, sign, torch.zeros_like(sign), dots, norms)


def choice(rows: int, columns: int, candidates: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.eye(columns) + torch.randn(columns, columns, generator=generator).triu(1) / columns**0.5
    return (
        torch.randn(columns, rows, generator=generator),
        torch.randn(columns, candidates, rows, generator=generator),
        factor,
        torch.rand(columns, generator=generator) + 0.5,
        torch.rand(candidates, rows, generator=generator) + 0.3,
        torch.empty(columns, candidates, rows),
        torch.rand(candidates, rows, generator=generator),
        torch.rand(candidates, rows, generator=generator),
    )


SHAPES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHAPES
@given(
    rows=st.integers(1, 100),
    words=st.integers(1, 8),
    candidates=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(list(Isa)),
)
def test_error_feedback_agrees_with_the_reference(
    rows: int, words: int, candidates: int, seed: int, isa: Isa, variants: list[Isa]
) -> None:
    if isa not in variants:
        return
    expected = choice(rows, 32 * words, candidates, seed)
    found = tuple(tensor.clone() for tensor in expected)
    choose_signs_reference(*expected)
    choose_signs(*found, isa=isa, threads=1)
    # Rows in which no choice was a tie within rounding have the same signs.
    same = (found[5] == expected[5]).all(0)
    assert same.float().mean() > 0.9
    for tensor in (6, 7):
        torch.testing.assert_close(found[tensor][same], expected[tensor][same], rtol=1e-3, atol=1e-3)


@SHAPES
@given(
    rows=st.integers(1, 100),
    words=st.integers(1, 10),
    candidates=st.integers(1, 4),
    sweeps=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(list(Isa)),
)
def test_sweeps_agree_with_the_reference(
    rows: int, words: int, candidates: int, sweeps: int, seed: int, isa: Isa, variants: list[Isa]
) -> None:
    if isa not in variants:
        return
    expected = problem(rows, 32 * words, candidates, seed)
    found = expected.copy()
    for _ in range(sweeps):
        expected.sweep_reference()
        found.sweep(isa)
    same = (found.sign == expected.sign).all(0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found.change[:, same], expected.change[:, same])
    for name in ("dots", "norms"):
        torch.testing.assert_close(
            getattr(found, name)[same], getattr(expected, name)[same], rtol=1e-3, atol=1e-2
        )
    # H s of a strip lacks the changes of the columns after it until the next sweep brings them.
    strip = {Isa.AVX2: 8, Isa.SCALAR: 4}.get(isa, 16)
    position = torch.arange(32 * words) // strip
    pending = found.hessian * (position.unsqueeze(0) > position.unsqueeze(1))
    up_to_date = found.product + (pending @ found.change.flatten(1)).view_as(found.sign)
    exact = (found.hessian @ found.sign.flatten(1)).view_as(found.sign)
    torch.testing.assert_close(up_to_date, exact, rtol=1e-3, atol=2e-3)


def test_rows_do_not_depend_on_their_neighbours_or_on_threads(isa: Isa) -> None:
    start = problem(70, 96, 2, seed=1)
    whole = start.copy().sweep(isa).sweep(isa)
    for threads in (2, 3):
        again = start.copy().sweep(isa, threads).sweep(isa, threads)
        assert torch.equal(whole.sign, again.sign)
        assert torch.equal(whole.norms, again.norms)
    part = start.rows(33, 50).sweep(isa).sweep(isa)
    assert torch.equal(part.sign, whole.sign[..., 33:50])
    chosen = choice(70, 64, 3, seed=2)
    again, alone = (tuple(t.clone() for t in chosen) for _ in range(2))
    choose_signs(*alone, isa=isa, threads=1)
    choose_signs(*again, isa=isa, threads=3)
    assert all(torch.equal(one, other) for one, other in zip(alone, again, strict=True))


def test_a_row_of_zeros_is_harmless(isa: Isa) -> None:
    start = problem(5, 64, 1, seed=3)
    start.target[:, 2] = 0
    start.dots[:, 2] = 0
    start.scale[:, 2] = torch.finfo(torch.float32).tiny
    swept = start.sweep(isa).sweep(isa)
    assert torch.isfinite(swept.norms).all()


def test_what_does_not_fit_is_refused() -> None:
    start = problem(4, 64, 1, seed=4)
    start.product = start.product.half()
    with pytest.raises(BackendError, match="product: expected contiguous"):
        start.sweep()
    wide = list(choice(4, 288, 1, seed=4))
    with pytest.raises(BackendError, match="refused 4 rows of 288 columns"):
        choose_signs(*wide)
    assert can_run(torch.device("cpu"), 40) == (False, "40 columns are not a multiple of 32")
    assert "on the CPU, not on meta" in can_run(torch.device("meta"), 32)[1]
