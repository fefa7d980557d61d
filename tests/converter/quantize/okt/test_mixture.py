"""The mixture of two mirrored Gaussians: its likelihood, EM steps and bounds."""

import math

import pytest
import torch
from bwla_converter.quantize.okt.mixture import (
    VARIANCE_FLOOR,
    Mixture,
    em_step,
    procrustes_target,
    start_mixture,
)
from random_tensors import normal


def test_likelihood_equals_the_density_of_two_normals() -> None:
    cells = normal(3, 5, 16)
    mixture = Mixture(torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99]), torch.tensor([1.0, 0.5, 0.15, 0.1, 1e-3]))
    c, v = (part.double().unsqueeze(-1) for part in (mixture.center, mixture.variance))
    both = torch.stack(
        [torch.distributions.Normal(s * c, v.sqrt()).log_prob(cells.double()) for s in (1, -1)]
    )
    expected = -(both.logsumexp(0) - math.log(2)).mean((0, 2))
    torch.testing.assert_close(em_step(cells, mixture)[1], expected, rtol=1e-6, atol=1e-6)


def test_one_step_of_em_in_closed_form() -> None:
    cells = normal(2, 4, 16) * 0.7
    before = Mixture(torch.full((4,), 0.5), torch.full((4,), 0.4))
    t = torch.tanh(0.5 * cells.double() / 0.4)
    center = (t * cells).mean((0, 2))
    after, _ = em_step(cells, before, ceiling=1.0)
    torch.testing.assert_close(after.center.double(), center, rtol=1e-5, atol=1e-6)
    spread = cells.double().square().mean((0, 2)) - center**2
    torch.testing.assert_close(after.variance.double(), spread, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(procrustes_target(cells, before).double(), t * (0.5 / 0.4), rtol=0, atol=1e-6)


def test_variance_stays_within_its_bounds() -> None:
    two_points = torch.where(normal(1, 4, 64) > 0, 1.0, -1.0)
    assert start_mixture(two_points).variance.tolist() == pytest.approx([VARIANCE_FLOOR] * 4)
    flat = normal(1, 4, 64)
    unit = flat / flat.square().mean(2, keepdim=True).sqrt()
    assert start_mixture(unit, 0.15).variance.tolist() == pytest.approx([0.15] * 4)
    assert (start_mixture(unit).center > 0.7).all(), "c = 0 would be a stationary point"
