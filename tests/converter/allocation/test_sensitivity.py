"""The sensitivities predict what small errors of an input group change, by measurement on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.allocation.sensitivity import (
    DAMPING,
    GradientMoments,
    measure_sensitivities,
    num_samples,
)
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.planning.plan import make_plan
from bwla_converter.quantize.group import group_generator
from bwla_converter.quantize.moments import rotate_hessian
from bwla_converter.quantize.okt.rotation import random_orthogonal
from bwla_converter.recipes.measurements import MAX_TOKENS, MIN_TOKENS, TOKENS_PER_COLUMN
from bwla_converter.source.model import Source, open_source
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import Provenance
from bwla_kernels.precision import has_fast_bfloat16
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

GROUPS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    has_fast_bfloat16.cache_clear()
    yield
    has_fast_bfloat16.cache_clear()


@pytest.fixture
def model(make_model) -> Path:
    return make_model(dtype=torch.float32)


def specs_of(source: Source) -> dict[str, LayerSpec]:
    return dict(make_plan(source, 0, 6, 1.0, Provenance()).specs)


def samples(source: Source, count: int) -> Tensor:
    vocabulary = source.entries["model.embed_tokens.weight"].shape[0]
    return torch.randint(0, vocabulary, (count, 24), generator=torch.Generator().manual_seed(1))


def divergence(model: Any, ids: Tensor, name: str, variance: float, seed: int) -> float:
    """Return the KL divergence in nats per token when a linear's inputs get noise of a relative variance."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rms = args[0].square().mean(-1, keepdim=True).sqrt()
        return (args[0] + variance**0.5 * rms * torch.randn(args[0].shape, generator=generator),)

    with torch.no_grad():
        before = model(ids).logits.double().log_softmax(-1)
        handle = model.get_submodule(name).register_forward_pre_hook(add_noise)
        after = model(ids).logits.double().log_softmax(-1)
        handle.remove()
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("name", GROUPS)
def test_independent_errors_of_inputs_change_the_model_as_predicted(model: Path, name: str) -> None:
    source = open_source(str(model), ())
    ids = samples(source, 48)
    found = measure_sensitivities(source, specs_of(source), ids, 0, ActivationStore())
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # One linear at a time gets noise; those of the group add up, as their noises are independent.
    members = next(names for index in range(2) for _, names in source.groups_of_layer(index) if name in names)
    variance, repeats = 1e-4, 6
    measured = sum(
        divergence(original, ids, member, variance, seed) / repeats
        for member in members
        for seed in range(repeats)
    )
    assert found[name].inputs * variance == pytest.approx(measured, rel=0.15)


def test_a_shaped_error_changes_the_outputs_as_predicted() -> None:
    """Compare with random errors e diag(L) L^-1 in the rotated basis."""
    generator = torch.Generator().manual_seed(3)
    spec = LayerSpec(8, 32, 1, 4, 8)
    layer = Layer(nn.Linear(32, 8, bias=False))
    collected = GradientMoments(layer, ["linear"], {"linear": spec})  # type: ignore[arg-type]
    mixing = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(400, 32, generator=generator) @ mixing
    token_weights = torch.rand(400, generator=generator) * inputs[:, 0].abs()
    collected.add(inputs, token_weights)
    gram = inputs.mT @ inputs / 400
    found = collected.sensitivity(seed=0, tokens=400)
    # The trace does not depend on the rotation for independent errors.
    expected = (token_weights * inputs.square().sum(1)).mean() / 2
    assert found.inputs == pytest.approx(float(expected), rel=1e-4)
    # With error feedback less is left, but never less than the metric of the weighted moments allows.
    weighted = (inputs * token_weights.unsqueeze(1)).mT @ inputs / 400
    least = 32 * weighted.double().logdet().div(32).exp() / 2
    assert float(least) < found.weights < found.inputs
    generator = group_generator(0, ["linear"])
    left, right = (random_orthogonal(1, order, generator) for order in (4, 8))
    gram, weighted = (rotate_hessian(matrix, left, right) for matrix in (gram, weighted))
    lower = torch.linalg.cholesky(gram + DAMPING * gram.diagonal().mean() * torch.eye(32))
    errors = torch.randn(20000, 32, generator=generator) * lower.diagonal() @ lower.inverse()
    assert found.weights == pytest.approx(float((errors @ weighted * errors).sum(1).mean() / 2), rel=0.05)


class Layer:
    """Stands for a decoder layer of one linear."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def linear(self, name: str) -> nn.Linear:
        return self._linear


def test_the_result_is_reproducible_and_names_every_group(model: Path) -> None:
    source, steps = open_source(str(model), ()), []
    ids = samples(source, 3)
    first, second = (
        measure_sensitivities(source, specs_of(source), ids, 0, ActivationStore(), lambda: steps.append(1))
        for _ in range(2)
    )
    assert first == second
    assert list(first) == [names[0] for index in range(2) for _, names in source.groups_of_layer(index)]
    assert all(0 < found.weights < found.inputs for found in first.values())
    assert len(steps) == 2 * 2 * source.num_layers


def test_wide_groups_need_more_tokens() -> None:
    specs = {"linear": LayerSpec(8, 32, 1, 4, 8)}
    assert num_samples(specs, 512) == -(-MIN_TOKENS // 512)
    wide = {"linear": LayerSpec(8, 2**12, 1, 64, 64)}
    assert num_samples(wide, 512) == TOKENS_PER_COLUMN * 2**12 // 512
    wider = {"linear": LayerSpec(8, 2**16, 1, 256, 256)}
    assert num_samples(wider, 512) == MAX_TOKENS // 512
