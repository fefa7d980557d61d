"""What down projections of experts are quantized for: the tokens that the quantized model's router sends to them."""

from pathlib import Path

import pytest
import torch
from any_model import KINDS, build_any_model, write_any_model
from bwla_converter.calibration import expert_inputs
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.calibration.stepwise import StepwiseLayer
from bwla_converter.quantize.moments import Moments
from torch import Tensor

NAMES = [f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(4)]
IDS = torch.arange(3, 83).reshape(5, 16)


class Layers:
    """Decoder layer 0 of the original model and of one whose linears changed, with samples on the way through both."""

    def __init__(self, folder: Path) -> None:
        source = write_any_model(build_any_model(**KINDS["experts"]), folder)
        self.store = ActivationStore()
        runner = LayerRunner(source, self.store.device)
        self.tensors = source.read(source.names_of_layer(0))
        samples = Samples.embedded(runner, self.store, IDS, 4)
        self.original, self.quantized = (
            StepwiseLayer(runner.layer(0, self.tensors), samples, self.store, {}) for _ in range(2)
        )
        for name in ("self_attn.v_proj", "mlp.experts.1.gate_proj", "mlp.experts.2.up_proj"):
            self.quantized.layer.linear(f"model.layers.0.{name}").weight.data *= 1.5

    def collect(self) -> tuple[Moments, Tensor]:
        weights = {name: self.tensors[f"{name}.weight"] for name in NAMES}
        with torch.no_grad():
            return expert_inputs.collect_expert_moments(weights, self.quantized, self.original, self.store)

    def expected(self, number: int, everything: bool = False) -> tuple[Tensor, Tensor]:
        """Return what down of expert `number` reads in the quantized model, and should read, [M, I]."""
        batch = next(self.quantized.samples.split(len(IDS)))
        with torch.no_grad():
            hidden, chosen = self.quantized.layer.routing(NAMES[0], batch)
            original, _ = self.original.layer.routing(NAMES[0], batch)
            tokens = torch.ones(len(hidden), dtype=torch.bool) if everything else (chosen == number).any(1)
            experts = [step.layer.experts_of(NAMES[0]) for step in (self.quantized, self.original)]
            assert all(experts)
            return tuple(
                module.hidden_values(number, states[tokens])  # type: ignore[union-attr, return-value]
                for module, states in zip(experts, (hidden, original), strict=True)
            )


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


def test_each_expert_has_the_moments_of_its_own_tokens(layers: Layers, monkeypatch) -> None:
    monkeypatch.setattr(expert_inputs, "STARVED_TOKENS", 0)
    moments, inputs = layers.collect()
    total = torch.zeros(64, 64)
    for number, name in enumerate(NAMES):
        x_hat, x = layers.expected(number)
        part = moments.parts[name]
        if name not in moments.starved:
            assert part.count == len(x_hat)
            torch.testing.assert_close(part.gram, x_hat.mT @ x_hat)
            torch.testing.assert_close(part.cross_gram, x.mT @ x_hat)
        total += x_hat.mT @ x_hat
    torch.testing.assert_close(moments.gram, total)
    assert moments.count == 2 * IDS.numel()  # each token has two experts
    assert inputs.shape == (2 * IDS.numel(), 64)


def test_a_starved_expert_is_also_fitted_to_other_tokens(layers: Layers) -> None:
    moments, _ = layers.collect()
    assert moments.starved  # 160 choices of four experts, whose down projections have 64 columns
    for name in moments.starved:
        number = NAMES.index(name)
        own, every = (layers.expected(number, everything)[0] for everything in (False, True))
        assert len(own) < 64
        part = moments.parts[name]
        assert part.count == len(own) + len(every)
        torch.testing.assert_close(part.gram, own.mT @ own + every.mT @ every)
    fed = [name for name in NAMES if name not in moments.starved]
    assert all(moments.parts[name].count >= 64 for name in fed)


def test_gate_and_up_read_what_all_experts_read(layers: Layers) -> None:
    [batch] = layers.quantized.samples.split(len(IDS))
    with torch.no_grad():
        hidden, _ = layers.quantized.layer.routing(NAMES[0], batch)
        for number in range(4):
            name = f"model.layers.0.mlp.experts.{number}.gate_proj"
            assert torch.equal(layers.quantized.layer.inputs_of(name, batch), hidden)
