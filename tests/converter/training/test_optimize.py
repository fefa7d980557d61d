"""Training lowers the loss, keeps to its limits, and is reproducible for a seed."""

import math
from dataclasses import replace

import pytest
import torch
from bwla_converter.training.optimize import TuneOptions, rate_factor, tune
from torch import Tensor, nn

OPTIONS = TuneOptions(epochs=6, batch=2)


def fit(options: TuneOptions, seed: int = 0) -> tuple[list[float], Tensor, int]:
    """Fit a vector to the mean of eight points; return the trace, the vector, and the number of steps."""
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    parameter = nn.Parameter(torch.full((3,), 4.0))
    steps: list[None] = []
    trace = tune(
        lambda indices: (parameter - points[indices]).square().mean(),
        [{"params": [parameter], "lr": 0.5}],
        len(points),
        options,
        torch.Generator().manual_seed(seed),
        lambda: steps.append(None),
    )
    return trace, parameter.detach(), len(steps)


def test_the_loss_falls() -> None:
    trace, _, steps = fit(OPTIONS)
    assert steps == 24
    assert len(trace) == 6
    assert trace[-1] < 0.5 * trace[0]


def test_same_seed_same_result() -> None:
    first, again, other = fit(OPTIONS), fit(OPTIONS), fit(OPTIONS, seed=5)
    assert torch.equal(first[1], again[1])
    assert first[0] == again[0]
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(
    ("changes", "steps"), [({"max_steps": 5}, 5), ({"epochs": 0}, 0), ({"minutes": 0.0}, 0)]
)
def test_budgets(changes: dict[str, float], steps: int) -> None:
    if changes.get("minutes") == 0.0:
        changes = {"minutes": 1e-12}
    trace, parameter, taken = fit(replace(OPTIONS, **changes))
    assert taken == steps
    assert math.ceil(steps / 4) == len(trace)
    assert torch.equal(parameter, torch.full((3,), 4.0)) is (steps == 0)


def test_rates_rise_and_fall_to_nothing() -> None:
    factors = [rate_factor(done / 100, 0.1) for done in range(101)]
    assert factors[:11] == pytest.approx([done / 10 for done in range(11)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.0)
