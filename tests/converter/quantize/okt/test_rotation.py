"""Rotations: each objective falls at every half step, and the rotation finds what was hidden from it."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from bwla_converter.common import tensors
from bwla_converter.quantize.okt.mixture import MixtureObjective
from bwla_converter.quantize.okt.moment import MomentObjective
from bwla_converter.quantize.okt.rotation import (
    Rotation,
    Start,
    StartObjective,
    State,
    _relaxed,
    fit_objective,
    learn_rotation,
    left_step,
    objective_for,
    random_orthogonal,
    right_step,
    start_state,
)
from bwla_kernels.errors import SourceError
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.reference import rotate
from bwla_kernels.sign_search import Effort, Metric, Target, gptq_binarize
from paths import EXAMPLE
from random_tensors import make_generator, normal
from safetensors import safe_open
from torch import Tensor

SIZES = (2, 8, 12)
WIDTH = 192
SLACK = 1e-6
"""Bound of the rounding error of a likelihood of about 1 in float32; larger objectives have it in proportion."""

UNBOUNDED = partial(MixtureObjective.start, ceiling=1.0)
OBJECTIVES = pytest.mark.parametrize(
    "objective",
    [MixtureObjective.start, UNBOUNDED, MomentObjective.start, partial(MomentObjective.start, power=4)],
    ids=["mixture", "unbounded", "fifth", "fourth"],
)


def student(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Return Student-t values with 4 degrees of freedom, whose tails are those of a weight with outliers."""
    chi = normal(4, rows, columns, seed=seed + 100).square().mean(0)
    return normal(rows, columns, seed=seed) / chi.sqrt()


def group() -> list[Tensor]:
    """Return two weights of one input group, with rows of very different norms."""
    return [student(40, WIDTH) * torch.logspace(-4, 4, 40).unsqueeze(1), normal(25, WIDTH, seed=2)]


def binarization_error(weight: Tensor) -> float:
    """Return the mean squared relative error of signs with the best row scales, 1 - mean|w|^2 / mean(w^2)."""
    return float((1 - weight.abs().mean(1).square() / weight.square().mean(1)).mean())


def planted(rows: int, n1: int, n2: int, noise: float = 0.2) -> Tensor:
    """Return rows with two clear peaks, hidden by a random Kronecker rotation."""
    peaks = torch.where(normal(rows, n1 * n2, seed=5) > 0, 1.0, -1.0) + noise * normal(rows, n1 * n2, seed=6)
    left, right = (random_orthogonal(1, n, make_generator(7 + n)).float() for n in (n1, n2))
    return rotate(peaks, left, right)


def rotate_all(weights: list[Tensor], rotation: Rotation) -> Tensor:
    return torch.cat([rotate(weight, rotation.left, rotation.right) for weight in weights])


def slack(objective: float) -> float:
    """Return the bound of the rounding error of an objective that starts at this value: 2 and more only for moments."""
    return SLACK * max(1.0, objective / 2)


def fit(state: State) -> State:
    return fit_objective(state)[0]


def value_of(state: State) -> float:
    return fit_objective(state)[1]


@OBJECTIVES
@pytest.mark.parametrize("start", ["random", "identity"])
def test_every_half_step_lowers_the_objective(objective: StartObjective, start: Start) -> None:
    state = start_state(group(), SIZES, make_generator(), objective, start)
    values = [value_of(state)]
    for _ in range(10):
        for step in (fit, left_step, right_step):
            state = step(state)
            values.append(value_of(state))
    assert all(after <= before + slack(values[0]) for before, after in pairwise(values))
    assert values[-1] < (1 - 1e-3) * values[0]


@OBJECTIVES
def test_the_trace_is_the_objective_after_each_round(objective: StartObjective) -> None:
    state = start_state(group(), SIZES, make_generator(), objective)
    values = [value_of(state)]
    for _ in range(3):
        state = right_step(left_step(fit(state)))
        values.append(value_of(state))
    calls: list[tuple[int, float]] = []
    rotation = learn_rotation(
        group(),
        SIZES,
        objective=objective,
        rounds=3,
        generator=make_generator(),
        relaxation=1.0,
        on_round=lambda *pair: calls.append(pair),
    )
    assert rotation.trace == values
    assert calls == list(enumerate(values))


@OBJECTIVES
@pytest.mark.parametrize("relaxation", [2.0, 16.0, 1024.0])
@pytest.mark.parametrize("weights", [group(), [planted(64, 2 * 8, 12)]], ids=["tails", "peaks"])
def test_over_relaxation_never_increases_the_objective_and_falls_faster(
    weights: list[Tensor], relaxation: float, objective: StartObjective
) -> None:
    plain, relaxed = (
        learn_rotation(
            weights, SIZES, objective=objective, rounds=30, generator=make_generator(), relaxation=factor
        ).trace
        for factor in (1.0, relaxation)
    )
    assert len(relaxed) == 31
    assert all(after <= before for before, after in pairwise(relaxed))
    assert relaxed[-1] < plain[-1]


@OBJECTIVES
def test_rounds_that_would_increase_the_objective_are_left_out(objective: StartObjective) -> None:
    def learned(rounds: int) -> Rotation:
        generator = make_generator()
        return learn_rotation(
            group(), SIZES, objective=objective, rounds=rounds, generator=generator, relaxation=2.0**14
        )

    trace = learned(20).trace
    left_out = [number for number in range(1, 21) if trace[number] == trace[number - 1]]
    assert 0 < len(left_out) < 20
    for number in (left_out[0], left_out[-1]):
        before, after = learned(number - 1), learned(number)
        assert torch.equal(before.left, after.left)
        assert torch.equal(before.right, after.right)


@pytest.mark.parametrize(("planes", "name"), [(1, "okt"), (2, "moment"), (3, "moment"), (4, "moment")])
def test_the_number_of_planes_decides_the_objective(planes: int, name: str) -> None:
    objective = objective_for(planes)
    learned = learn_rotation(group(), SIZES, objective=objective, rounds=1, generator=make_generator())
    assert learned.objective == name


def test_over_relaxation_multiplies_the_distance_from_the_identity() -> None:
    angle, relaxation = 0.01, 8.0
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = torch.tensor([[[cos, -sin], [sin, cos]]], dtype=torch.float64)
    relaxed = _relaxed(rotation, relaxation)
    torch.testing.assert_close(relaxed.mT @ relaxed, torch.eye(2, dtype=torch.float64).unsqueeze(0))
    assert math.atan2(float(relaxed[0, 1, 0]), float(relaxed[0, 0, 0])) == pytest.approx(0.08, rel=0.01)
    assert _relaxed(rotation, 1.0) is rotation


def test_the_state_holds_the_unit_rows_rotated_as_the_kernels_rotate_them() -> None:
    state = start_state(group(), SIZES, make_generator())
    for _ in range(5):
        state = right_step(left_step(fit(state)))
    unit = torch.cat([w / w.square().mean(1, keepdim=True).sqrt() for w in group()])
    rows = torch.cat([chunk.permute(2, 0, 1, 3).flatten(1) for chunk in state.chunks])
    torch.testing.assert_close(rows, rotate(unit, state.left, state.right), atol=1e-5, rtol=0)


@OBJECTIVES
@pytest.mark.parametrize("relaxation", [1.0, None])
def test_rotations_are_orthogonal(relaxation: float | None, objective: StartObjective) -> None:
    rotation = learn_rotation(
        group(), SIZES, objective=objective, generator=make_generator(), relaxation=relaxation
    )
    for factor in (rotation.left, rotation.right):
        gram = factor.mT @ factor
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=2**-10, rtol=0)


@OBJECTIVES
@pytest.mark.parametrize("relaxation", [1.0, None])
def test_rotations_keep_the_product(relaxation: float | None, objective: StartObjective) -> None:
    weights = group()
    rotation = learn_rotation(
        weights, SIZES, objective=objective, generator=make_generator(), relaxation=relaxation
    )
    x = normal(3, WIDTH, seed=9)
    x_hat = rotate(x, rotation.left, rotation.right)
    w_hat = rotate(weights[1], rotation.left, rotation.right)
    product = x @ weights[1].t()
    # The factors are rounded as they are stored.
    assert float((x_hat @ w_hat.t() - product).norm() / product.norm()) < 1e-3


def test_planted_peaks_are_found() -> None:
    weight = planted(64, 4, 8)
    rotation = learn_rotation([weight], (1, 4, 8), generator=make_generator())
    assert binarization_error(weight) > 0.3
    assert binarization_error(rotate_all([weight], rotation)) < 0.05


def test_heavy_tails_are_removed() -> None:
    weight = student(96, 384)
    learned = rotate_all([weight], learn_rotation([weight], (1, 16, 24), generator=make_generator()))
    at_random = rotate_all(
        [weight], learn_rotation([weight], (1, 16, 24), rounds=0, generator=make_generator())
    )
    assert binarization_error(weight) > 0.45
    assert binarization_error(learned) < binarization_error(at_random) - 0.02


def test_the_ceiling_keeps_the_peaks_apart() -> None:
    weight = normal(96, 384)
    errors = [
        binarization_error(
            rotate_all(
                [weight],
                learn_rotation([weight], (1, 16, 24), objective=objective, generator=make_generator()),
            )
        )
        for objective in (MixtureObjective.start, UNBOUNDED)
    ]
    assert errors[0] < errors[1] - 0.003


def test_several_planes_gain_more_from_short_tails() -> None:
    """On a trained model's weight: each number of planes has the smaller error with its own objective."""
    with safe_open(next(EXAMPLE.glob("*.safetensors")), "pt") as file:
        weight = file.get_tensor("model.layers.2.mlp.up_proj.weight").float()
    sizes = choose_rotation(weight.shape[1])
    metric = Metric.of(torch.eye(weight.shape[1]))
    errors: dict[tuple[int, int], float] = {}
    for learned_for in (1, 3):
        objective = objective_for(learned_for)
        rotation = learn_rotation([weight], sizes, objective=objective, rounds=20, generator=make_generator())
        target = Target.of(rotate_all([weight], rotation), metric)
        for planes in (1, 3):
            found = gptq_binarize(target, metric, Effort((1.0,), ((1, 4),)), planes)
            errors[planes, learned_for] = float(found.error.sum())
    assert errors[1, 1] < 0.995 * errors[1, 3]
    assert errors[3, 3] < 0.95 * errors[3, 1]


@OBJECTIVES
def test_one_rotation_is_learned_from_the_rows_of_all_linears(objective: StartObjective) -> None:
    apart = learn_rotation(
        group(), SIZES, objective=objective, rounds=5, generator=make_generator(), relaxation=1.0
    )
    pooled = learn_rotation(
        [torch.cat(group())], SIZES, objective=objective, rounds=5, generator=make_generator(), relaxation=1.0
    )
    torch.testing.assert_close(apart.left, pooled.left, atol=1e-4, rtol=0)
    assert apart.trace == pytest.approx(pooled.trace, abs=slack(pooled.trace[0]))


@OBJECTIVES
def test_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch, objective: StartObjective) -> None:
    whole = learn_rotation(
        group(), SIZES, objective=objective, rounds=5, generator=make_generator(), relaxation=1.0
    )
    monkeypatch.setitem(tensors.CHUNK_ELEMENTS, "cpu", 7 * WIDTH)
    chunked = learn_rotation(
        group(), SIZES, objective=objective, rounds=5, generator=make_generator(), relaxation=1.0
    )
    torch.testing.assert_close(whole.right, chunked.right, atol=1e-4, rtol=0)


@OBJECTIVES
def test_rows_of_zeros_change_nothing(objective: StartObjective) -> None:
    plain = learn_rotation(
        group(), SIZES, objective=objective, rounds=5, generator=make_generator(), relaxation=1.0
    )
    padded = learn_rotation(
        [*group(), torch.zeros(3, WIDTH)],
        SIZES,
        objective=objective,
        rounds=5,
        generator=make_generator(),
        relaxation=1.0,
    )
    torch.testing.assert_close(plain.left, padded.left, atol=1e-4, rtol=0)
    assert plain.trace == pytest.approx(padded.trace, abs=slack(padded.trace[0]))


@OBJECTIVES
def test_a_weight_of_zeros_keeps_its_start(objective: StartObjective) -> None:
    rotation = learn_rotation(
        [torch.zeros(4, 32)],
        (1, 4, 8),
        objective=objective,
        rounds=2,
        generator=make_generator(),
        start="identity",
    )
    torch.testing.assert_close(rotation.left, torch.eye(4).unsqueeze(0))
    assert rotation.trace == [0.0, 0.0, 0.0]


def test_a_factor_of_order_one_is_a_sign() -> None:
    rotation = learn_rotation([normal(20, 32)], (1, 1, 32), rounds=3, generator=make_generator())
    assert rotation.left.abs().item() == pytest.approx(1.0)


def test_the_seed_determines_the_rotation_and_the_weights_are_not_modified() -> None:
    weights = group()
    copies = [weight.clone() for weight in weights]
    first, again, other = (
        learn_rotation(weights, SIZES, rounds=3, generator=make_generator(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.right, again.right)
    assert first.trace == again.trace
    assert not torch.equal(first.left, other.left)
    assert all(torch.equal(before, after) for before, after in zip(copies, weights, strict=True))


def test_bad_weights_are_refused() -> None:
    spoiled = normal(4, WIDTH)
    spoiled[1, 2] = math.nan
    with pytest.raises(SourceError, match=r"weight 1 of the input group: expected finite values"):
        learn_rotation([normal(4, WIDTH), spoiled], SIZES, generator=make_generator())
    with pytest.raises(
        SourceError, match=r"weight 0 of the input group: expected shape \[N, 192\].*found \(4, 191\)"
    ):
        learn_rotation([normal(4, 191)], SIZES, generator=make_generator())
