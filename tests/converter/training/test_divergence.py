"""The KL divergence computed in chunks: the same value and gradient as by autograd on all logits."""

import pytest
import torch
from bwla_converter.training import divergence
from bwla_converter.training.divergence import Head, kl_divergence, sampled_direction_gradient
from torch import Tensor, nn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_random_directions_measure_the_cosine_distance() -> None:
    """Half the mean square of a small change along them is what the change adds to one minus the cosine."""
    hidden, change = normal(1, 64, seed=1) + 2.0, 1e-3 * normal(1, 64, seed=2)
    generator = torch.Generator().manual_seed(0)
    gradients = sampled_direction_gradient(hidden.expand(40_000, 64), generator)
    expected = 1 - torch.cosine_similarity(hidden.double(), (hidden + change).double())
    found = (gradients.double() @ change[0].double()).square().mean() / 2
    torch.testing.assert_close(found, expected[0], rtol=0.03, atol=0.0)
    assert float((gradients @ hidden[0]).abs().max()) < 1e-4, "a longer hidden state has the same cosine"


class CappedHead:
    """A head with a soft cap, as in Gemma 2."""

    def __init__(self, weight: Tensor, soft_cap: float | None = None) -> None:
        self.weight, self.soft_cap = weight, soft_cap

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.weight.mT
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def reference(hidden: Tensor, head: Head, original_hidden: Tensor, original_head: Head) -> Tensor:
    model, original = head(hidden), original_head(original_hidden)
    return nn.functional.kl_div(
        model.log_softmax(-1).flatten(0, -2), original.softmax(-1).flatten(0, -2), reduction="batchmean"
    )


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 40 * 7, 2**22])
def test_value_and_gradient_are_autograds(
    monkeypatch: pytest.MonkeyPatch, soft_cap: float | None, chunk: int
) -> None:
    monkeypatch.setattr(divergence, "CHUNK_LOGITS", chunk)
    head, original_head = (
        CappedHead(normal(40, 16, seed=1), soft_cap),
        CappedHead(normal(40, 12, seed=2), soft_cap),
    )
    original_hidden = normal(3, 11, 12, seed=3)
    first, second = (normal(3, 11, 16).requires_grad_() for _ in range(2))
    value = kl_divergence(first, head, original_hidden, original_head, 40)
    expected = reference(second, head, original_hidden, original_head)
    torch.testing.assert_close(value, expected)
    (2 * value).backward()
    (2 * expected).backward()
    assert first.grad is not None
    torch.testing.assert_close(first.grad, second.grad)


def test_it_vanishes_for_equal_models_and_needs_no_gradient() -> None:
    head, hidden = CappedHead(normal(40, 16, seed=1)), normal(2, 5, 16)
    assert float(kl_divergence(hidden, head, hidden, head, 40)) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        value = kl_divergence(hidden.requires_grad_(), head, normal(2, 5, 16, seed=4), head, 40)
    assert float(value) > 0.1
    assert not value.requires_grad
