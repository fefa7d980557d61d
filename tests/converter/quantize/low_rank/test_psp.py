"""PSP: the objective falls at every half step, and a planted low-rank part is removed."""

import math
from itertools import pairwise

import pytest
import torch
from bwla_converter.common import tensors
from bwla_converter.quantize.low_rank import psp
from bwla_converter.quantize.low_rank.psp import proximal_low_rank
from bwla_converter.quantize.okt.mixture import VARIANCE_CEILING
from bwla_kernels.errors import SourceError
from random_tensors import make_generator, normal
from torch import Tensor

SLACK = 1e-6


def planted(rank: int = 3, rows: int = 60, columns: int = 96) -> tuple[Tensor, Tensor]:
    """Return bimodal rows of different norms plus a low-rank matrix, and that matrix."""
    peaks = torch.where(normal(rows, columns, seed=5) > 0, 1.0, -1.0) + 0.2 * normal(rows, columns, seed=6)
    low = 0.7 * normal(rows, rank, seed=7) @ normal(rank, columns, seed=8)
    size = torch.logspace(-3, 3, rows).unsqueeze(1)
    return (peaks + low) * size, low * size


def row_errors(estimate: Tensor, true: Tensor) -> Tensor:
    errors: Tensor = (estimate - true).norm(dim=1) / true.norm(dim=1)
    return errors


@pytest.mark.parametrize("ceiling", [VARIANCE_CEILING, 1.0])
@pytest.mark.parametrize("rank", [1, 4])
def test_every_half_step_lowers_the_objective(rank: int, ceiling: float) -> None:
    weight = normal(60, 96) * torch.logspace(-3, 3, 60).unsqueeze(1)
    state = psp.start_state(weight, rank, make_generator(), ceiling)
    values = []
    for _ in range(12):
        updated, objective = psp.mixture_step(state)
        values.append(objective)
        values.append(psp.mixture_step(updated)[1])
        state = psp.low_rank_step(updated)
    values.append(psp.mixture_step(state)[1])
    assert all(after <= before + SLACK for before, after in pairwise(values))
    assert values[-1] < values[0] - 1e-3


def test_a_planted_low_rank_part_is_found() -> None:
    weight, low = planted()
    fitted = proximal_low_rank(weight, 3, generator=make_generator())
    assert row_errors(fitted.b @ fitted.a, low).median() < 0.25
    residual = weight - fitted.b @ fitted.a
    bimodal = 1 - residual.abs().mean(1).square() / residual.square().mean(1)
    assert bimodal.mean() < 0.1
    raw = 1 - weight.abs().mean(1).square() / weight.square().mean(1)
    assert raw.mean() > 0.25


def test_the_step_is_the_whitened_truncated_svd_of_the_target() -> None:
    """At convergence, subspace iteration agrees with an exact SVD."""
    weight, _ = planted()
    state, _ = psp.mixture_step(psp.start_state(weight, 3, make_generator()))
    mixture = state.mixtures[0]
    root = mixture.variance.sqrt().unsqueeze(1)
    unit = weight / weight.square().mean(1, keepdim=True).sqrt()
    target = mixture.center.unsqueeze(1) * torch.tanh(unit * mixture.slope)
    point = (unit - target) / root
    u, s, vh = torch.linalg.svd(point.double(), full_matrices=False)
    expected = root * (u[:, :3] * s[:3] @ vh[:3]).float()
    basis = psp.dominant_row_space([point[:20], point[20:]], state.basis, 60)[:, :3]
    torch.testing.assert_close(root * (point @ basis) @ basis.mT, expected, atol=1e-4, rtol=1e-3)
    stepped = psp.low_rank_step(state)
    distance = [float(((m / root) - point).norm()) for m in (stepped.b @ stepped.a, expected)]
    assert distance[1] <= distance[0] <= 1.02 * distance[1]


def test_the_captured_squared_norm_never_falls() -> None:
    matrix = normal(50, 40)
    basis = torch.linalg.qr(normal(40, 6, seed=2))[0]
    captured = []
    for _ in range(8):
        captured.append(float((matrix @ basis[:, :3]).square().sum()))
        basis = psp.dominant_row_space([matrix], basis, 1)
    assert all(after >= before - 1e-3 for before, after in pairwise(captured))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6), atol=1e-5, rtol=0)


def test_shapes_trace_and_progress() -> None:
    weight, _ = planted()
    calls: list[tuple[int, float]] = []
    fitted = proximal_low_rank(
        weight, 2, rounds=5, generator=make_generator(), on_round=lambda *pair: calls.append(pair)
    )
    assert (fitted.b.shape, fitted.a.shape) == ((60, 2), (2, 96))
    assert calls == list(enumerate(fitted.trace))
    assert len(fitted.trace) == 6
    torch.testing.assert_close(fitted.a @ fitted.a.mT, torch.eye(2), atol=1e-5, rtol=0)


def test_rank_zero_is_empty() -> None:
    fitted = proximal_low_rank(normal(5, 32), 0, generator=make_generator())
    assert (fitted.b.shape, fitted.a.shape, fitted.trace) == ((5, 0), (0, 32), [])


def test_full_rank_works() -> None:
    fitted = proximal_low_rank(normal(4, 32), 4, rounds=3, generator=make_generator())
    assert torch.isfinite(fitted.b @ fitted.a).all()


def test_zero_rows_stay_zero_and_change_nothing() -> None:
    weight, _ = planted()
    plain = proximal_low_rank(weight, 3, rounds=5, generator=make_generator())
    padded = proximal_low_rank(
        torch.cat([weight, torch.zeros(2, 96)]), 3, rounds=5, generator=make_generator()
    )
    assert (padded.b[60:] == 0).all()
    assert padded.trace == pytest.approx(plain.trace, abs=1e-6)
    zeros = proximal_low_rank(torch.zeros(4, 32), 2, rounds=2, generator=make_generator())
    assert torch.equal(zeros.b @ zeros.a, torch.zeros(4, 32))


def test_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = planted()
    whole = proximal_low_rank(weight, 3, rounds=5, generator=make_generator())
    monkeypatch.setitem(tensors.CHUNK_ELEMENTS, "cpu", 7 * 96)
    chunked = proximal_low_rank(weight, 3, rounds=5, generator=make_generator())
    assert row_errors(chunked.b @ chunked.a, whole.b @ whole.a).max() < 1e-3


def test_the_seed_determines_the_result_and_the_weight_is_not_modified() -> None:
    weight, _ = planted()
    copy = weight.clone()
    first, again = (proximal_low_rank(weight, 3, rounds=3, generator=make_generator()) for _ in range(2))
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)
    assert torch.equal(weight, copy)


def test_bad_input_is_refused() -> None:
    with pytest.raises(SourceError, match=r"found shape \(5, 32\) and rank 6"):
        proximal_low_rank(normal(5, 32), 6, generator=make_generator())
    spoiled = normal(5, 32)
    spoiled[0, 0] = math.inf
    with pytest.raises(SourceError, match="finite"):
        proximal_low_rank(spoiled, 2, generator=make_generator())
