"""The final norm in closed form: least squares per channel, for every kind of norm."""

import pytest
import torch
from bwla_converter.quantize.final_norm import fit_norm
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

HIDDEN = 16
NORMS = {"RMSNorm": LlamaRMSNorm, "1 + weight": Gemma3RMSNorm, "LayerNorm": nn.LayerNorm}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_norm(kind: str, generator: torch.Generator) -> nn.Module:
    norm = NORMS[kind](HIDDEN)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.rand(HIDDEN, generator=generator) + 0.5)
    return norm.requires_grad_(False)


def with_weight(norm: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    before = norm.get_parameter("weight").clone()
    norm.get_parameter("weight").copy_(weight)
    y: Tensor = norm(x)
    norm.get_parameter("weight").copy_(before)
    return y


@pytest.mark.parametrize("kind", list(NORMS))
def test_without_quantization_error_the_weight_is_unchanged(kind: str, generator: torch.Generator) -> None:
    norm, hidden = make_norm(kind, generator), torch.randn(3, 5, HIDDEN, generator=generator)
    torch.testing.assert_close(fit_norm(norm, [(hidden, hidden)]), norm.get_parameter("weight"))


@pytest.mark.parametrize("kind", list(NORMS))
def test_no_other_weight_is_closer(kind: str, generator: torch.Generator) -> None:
    norm, hidden = make_norm(kind, generator), torch.randn(3, 40, HIDDEN, generator=generator)
    noisy = hidden + 0.5 * torch.randn(3, 40, HIDDEN, generator=generator)
    weight, original = fit_norm(norm, [(hidden[:1], noisy[:1]), (hidden[1:], noisy[1:])]), norm(hidden)

    def error(candidate: Tensor) -> float:
        return float((with_weight(norm, candidate, noisy) - original).double().square().sum())

    best = error(weight)
    assert best < 0.95 * error(norm.get_parameter("weight"))
    for channel in range(HIDDEN):
        for step in (-0.01, 0.01):
            other = weight.clone()
            other[channel] += step
            assert error(other) > best


def test_a_channel_that_is_always_zero_keeps_its_weight(generator: torch.Generator) -> None:
    norm, hidden = make_norm("RMSNorm", generator), torch.randn(3, 5, HIDDEN, generator=generator)
    hidden[..., 2] = 0.0
    weight = fit_norm(norm, [(hidden, hidden + 0.1 * hidden.roll(1, 1))])
    assert weight[2] == norm.get_parameter("weight")[2]
    assert torch.isfinite(weight).all()
